#include "train/metrics.h"

#include <unistd.h>

#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <sstream>

#include "base/error.h"
#include "base/files.h"
#include "base/host.h"
#include "base/log.h"

namespace caldera {

Json to_json(const StepMetrics& m) {
  Json json = {{"step", m.step},
          {"epoch", m.epoch},
          {"loss", m.loss},
          {"lr", m.lr},
          {"grad_norm", m.grad_norm},
          {"num_tokens", m.num_tokens},
          {"num_supervised", m.num_supervised},
          {"num_images", m.num_images},
          {"tokens_per_second", m.tokens_per_second},
          {"step_ms", m.step_ms},
          {"data_wait_ms", m.data_wait_ms},
          {"peak_memory_bytes", m.peak_memory_bytes}};
  if (m.num_passed_over > 0) json["num_passed_over"] = m.num_passed_over;
  if (m.comm_collectives > 0) {
    json["comm_collectives"] = m.comm_collectives;
    json["comm_bytes"] = m.comm_bytes;
  }
  return json;
}

namespace {

// CRC-32C (Castagnoli), masked as TFRecord wants it.
uint32_t masked_crc32c(std::string_view bytes) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = (c & 1) != 0 ? (c >> 1) ^ 0x82F63B78u : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = 0xFFFFFFFFu;
  for (const char byte : bytes) crc = (crc >> 8) ^ table[(crc ^ static_cast<uint8_t>(byte)) & 0xFF];
  crc = ~crc;
  return std::rotr(crc, 15) + 0xA282EAD8u;
}

// The few pieces of the protocol buffer wire format that an Event takes.
void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>((value & 0x7F) | 0x80));
  out.push_back(static_cast<char>(value));
}
template <class T>
void put_raw(std::string& out, T value) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}
void put_bytes(std::string& out, int field, std::string_view bytes) {
  put_varint(out, static_cast<uint64_t>(field) << 3 | 2);
  put_varint(out, bytes.size());
  out.append(bytes);
}
std::string event_head(int64_t step) {
  std::string out;
  out.push_back(0x09);  // wall_time: double, field 1
  put_raw(out, std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count());
  out.push_back(0x10);  // step: varint, field 2
  put_varint(out, static_cast<uint64_t>(step));
  return out;
}

fs::path event_file(const fs::path& folder) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  return folder / fmt::format("events.out.tfevents.{}.{}.{}",
                              std::chrono::duration_cast<std::chrono::milliseconds>(now).count(), host_name(),
                              ::getpid());
}

}  // namespace

GrowingFile::GrowingFile(fs::path path) : path_(std::move(path)) {
  file_.rdbuf()->pubsetbuf(nullptr, 0);  // a piece that failed does not stay behind
  file_.open(path_, std::ios::binary | std::ios::app);
  CALDERA_CHECK(file_.good(), Error, "{}: cannot open for appending: {}", path_.string(),
                std::strerror(errno));
  num_bytes_ = fs::file_size(path_);
}

void GrowingFile::append(std::string_view bytes) {
  if (file_.write(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    num_bytes_ += bytes.size();
    return;
  }
  if (!std::exchange(has_warned_, true))
    log_warning("{}: cannot append: {}; what is measured meanwhile is missing there, training goes on",
                path_.string(), std::strerror(errno));
  file_.clear();
  std::error_code ignored;
  fs::resize_file(path_, num_bytes_, ignored);  // the part of it that was written
}

TensorBoardWriter::TensorBoardWriter(const fs::path& folder, int64_t first_step) : file_(event_file(folder)) {
  std::string version = event_head(0);
  put_bytes(version, 3, "brain.Event:2");
  event(version);
  // SessionLog{status: START}: TensorBoard forgets points at or after this step. A run that was cut off
  // before its first checkpoint has left some, too.
  std::string start = event_head(first_step + 1);
  put_bytes(start, 7, std::string("\x08\x01", 2));
  event(start);
}

void TensorBoardWriter::scalars(int64_t step, const std::map<std::string, double>& values) {
  std::string summary;
  for (const auto& [tag, value] : values) {
    std::string item;
    put_bytes(item, 1, tag);
    item.push_back(0x15);  // simple_value: float, field 2
    put_raw(item, static_cast<float>(value));
    put_bytes(summary, 1, item);
  }
  std::string body = event_head(step);
  put_bytes(body, 5, summary);
  event(body);
}

void TensorBoardWriter::event(const std::string& body) {
  std::string length, frame;
  put_raw(length, static_cast<uint64_t>(body.size()));
  frame = length;
  put_raw(frame, masked_crc32c(length));
  frame += body;
  put_raw(frame, masked_crc32c(body));
  file_.append(frame);
}

namespace {

// Keeps the whole lines of steps that the run still stands on. Returns the path.
fs::path cut_back(const fs::path& path, int64_t resumed_step) {
  if (!fs::exists(path)) return path;
  std::string kept;
  std::istringstream lines(read_file(path));
  for (std::string line; std::getline(lines, line);) {
    const Json json = json_or_null(line);
    if (json.is_object() && json.contains("step") && json["step"].get<int64_t>() <= resumed_step) kept += line + "\n";
  }
  write_file_atomic(path, kept);
  return path;
}

}  // namespace

MetricsLog::MetricsLog(const fs::path& folder, int64_t resumed_step)
    : file_(cut_back(folder / "metrics.jsonl", resumed_step)), tensorboard_(folder, resumed_step) {}

void MetricsLog::line(const Json& json) { file_.append(json_line(json) + "\n"); }

void MetricsLog::step(const StepMetrics& m) {
  line(to_json(m));
  tensorboard_.scalars(m.step, {{"train/loss", m.loss},
                                {"train/learning_rate", m.lr},
                                {"train/grad_norm", m.grad_norm},
                                {"train/tokens_per_second", m.tokens_per_second}});
}

void MetricsLog::evaluation(int64_t step, double eval_loss) {
  line({{"step", step}, {"eval_loss", eval_loss}});
  tensorboard_.scalars(step, {{"eval/loss", eval_loss}});
}

}  // namespace caldera
