#include "model/weights/safetensors.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "base/error.h"
#include "base/lfs_pointer.h"
#include "base/strings.h"
#include "model/weights/safetensors_types.h"

namespace caldera {
namespace {

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the reference's limit
constexpr int kMaxHeaderDepth = 16;

// Keyed by std::map: with ordered_json a header of a million names would take a million squared comparisons.
using HeaderJson = nlohmann::json;

struct Entry {
  at::ScalarType type = at::kFloat;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // in the data section
};

struct Header {
  std::map<std::string, Entry> entries;
  std::map<std::string, std::string> metadata;
  uint64_t data_begin = 0;
};

HeaderJson parse_header(std::string_view text, const std::string& file) {
  CALDERA_CHECK(text.starts_with('{'), CheckpointError,
                "{}: malformed safetensors: the header does not begin with \"{{\"", file);
  // nlohmann takes a NUL for the end of its input; in JSON there is none.
  CALDERA_CHECK(text.find('\0') == std::string_view::npos, CheckpointError,
                "{}: malformed safetensors: a NUL byte in the header", file);
  std::vector<std::set<std::string>> keys;  // of each object that is open
  const auto inspect = [&](int depth, HeaderJson::parse_event_t event, HeaderJson& parsed) {
    CALDERA_CHECK(depth <= kMaxHeaderDepth, CheckpointError,
                  "{}: malformed safetensors: a header nested deeper than {} levels", file, kMaxHeaderDepth);
    if (event == HeaderJson::parse_event_t::object_start) keys.emplace_back();
    if (event == HeaderJson::parse_event_t::object_end) keys.pop_back();
    if (event == HeaderJson::parse_event_t::key)
      CALDERA_CHECK(keys.back().insert(parsed.get<std::string>()).second, CheckpointError,
                    "{}: malformed safetensors: the name {} occurs twice", file, parsed.dump());
    return true;
  };
  try {
    return HeaderJson::parse(text.begin(), text.end(), inspect);
  } catch (const HeaderJson::exception& error) {
    throw CheckpointError(
        fmt::format("{}: malformed safetensors: the header is not JSON: {}", file, error.what()));
  }
}

uint64_t unsigned_value(const HeaderJson& value, const std::string& where) {
  CALDERA_CHECK(value.is_number_unsigned(), CheckpointError, "{}: expected an unsigned integer, got {}",
                where, value.dump(-1, ' ', false, HeaderJson::error_handler_t::replace));
  return value.get<uint64_t>();
}

Entry parse_entry(const HeaderJson& json, const std::string& where) {
  CALDERA_CHECK(json.is_object(), CheckpointError, "{}: expected an object", where);
  for (const char* key : {"dtype", "shape", "data_offsets"})
    CALDERA_CHECK(json.contains(key), CheckpointError, "{}: \"{}\" is missing", where, key);
  Entry entry;
  const HeaderJson& dtype = json["dtype"];
  CALDERA_CHECK(dtype.is_string(), CheckpointError, "{}: dtype is no string", where);
  const std::string name = dtype.get<std::string>();
  const auto* known = std::find_if(std::begin(kSafetensorsTypes), std::end(kSafetensorsTypes),
                                   [&](const SafetensorsType& t) { return t.name == name; });
  CALDERA_CHECK(known != std::end(kSafetensorsTypes), CheckpointError, "{}: unknown dtype \"{}\"", where,
                name);
  entry.type = known->type;

  CALDERA_CHECK(json["shape"].is_array(), CheckpointError, "{}: shape is no array", where);
  uint64_t num_elements = 1, stride = 1;
  for (const HeaderJson& dim : json["shape"]) {
    const uint64_t size = unsigned_value(dim, where + ": shape");
    constexpr auto kLimit = static_cast<uint64_t>(INT64_MAX);
    // The stride counts a dimension of zero as one, as torch does; it too must fit.
    CALDERA_CHECK(size <= kLimit && stride <= kLimit / std::max<uint64_t>(size, 1), CheckpointError,
                  "{}: the shape's product overflows", where);
    num_elements *= size;
    stride *= std::max<uint64_t>(size, 1);
    entry.shape.push_back(static_cast<int64_t>(size));
  }
  const HeaderJson& offsets = json["data_offsets"];
  CALDERA_CHECK(offsets.is_array() && offsets.size() == 2, CheckpointError, "{}: data_offsets is no pair",
                where);
  entry.begin = unsigned_value(offsets[0], where + ": data_offsets");
  entry.end = unsigned_value(offsets[1], where + ": data_offsets");
  CALDERA_CHECK(entry.begin <= entry.end, CheckpointError, "{}: data_offsets [{}, {}] are reversed", where,
                entry.begin, entry.end);
  const uint64_t element_bytes = c10::elementSize(entry.type);
  CALDERA_CHECK(
      num_elements <= UINT64_MAX / element_bytes && num_elements * element_bytes == entry.end - entry.begin,
      CheckpointError, "{}: {} elements of {} take {} bytes each, but data_offsets give {} bytes", where,
      num_elements, name, element_bytes, entry.end - entry.begin);
  return entry;
}

Header read_header(std::span<const std::byte> bytes, const std::string& file) {
  refuse_lfs_pointer(bytes, file);
  CALDERA_CHECK(bytes.size() >= 8, CheckpointError,
                "{}: malformed safetensors: {} bytes are no file; is it truncated?", file, bytes.size());
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  CALDERA_CHECK(length <= kMaxHeaderBytes, CheckpointError,
                "{}: malformed safetensors: a header of {} bytes; at most {} are allowed", file, length,
                kMaxHeaderBytes);
  CALDERA_CHECK(length <= bytes.size() - 8, CheckpointError,
                "{}: malformed safetensors: a header of {} bytes in a file of {}; is it truncated?", file,
                length, bytes.size());
  const HeaderJson json = parse_header({reinterpret_cast<const char*>(bytes.data()) + 8, length}, file);

  Header header;
  header.data_begin = 8 + length;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      CALDERA_CHECK(value.is_object(), CheckpointError,
                    "{}: malformed safetensors: __metadata__ is no object", file);
      for (const auto& [key, text] : value.items()) {
        CALDERA_CHECK(text.is_string(), CheckpointError,
                      "{}: malformed safetensors: __metadata__[\"{}\"] is no string", file, key);
        header.metadata[key] = text.get<std::string>();
      }
      continue;
    }
    CALDERA_CHECK(name.find('\0') == std::string::npos, CheckpointError,
                  "{}: malformed safetensors: a tensor's name holds NUL", file);
    header.entries[name] = parse_entry(value, fmt::format("{}: malformed safetensors: {}", file, name));
  }

  // The tensors tile the data section: no hole, no overlap, nothing behind.
  std::vector<const std::pair<const std::string, Entry>*> order;
  for (const auto& item : header.entries) order.push_back(&item);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t expected = 0;
  for (const auto* item : order) {
    CALDERA_CHECK(item->second.begin == expected, CheckpointError,
                  "{}: malformed safetensors: {}: expected its data at byte {}, got {}", file, item->first,
                  expected, item->second.begin);
    expected = item->second.end;
  }
  const uint64_t present = bytes.size() - header.data_begin;
  CALDERA_CHECK(expected == present, CheckpointError,
                "{}: malformed safetensors: the tensors take {} bytes, the file holds {}; is it truncated?",
                file, expected, present);
  return header;
}

class SafetensorsFile : public TensorSource {
 public:
  explicit SafetensorsFile(const fs::path& file)
      : map_(std::make_shared<MappedFile>(file)), header_(read_header(map_->bytes(), file.string())) {}

  std::vector<std::string> names() const override {
    std::vector<std::string> result;
    for (const auto& [name, entry] : header_.entries) result.push_back(name);
    return result;
  }
  bool has(const std::string& name) const override { return header_.entries.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const override { return entry(name).shape; }
  std::string where(const std::string&) const override { return map_->path().string(); }

  at::Tensor read(const std::string& name) const override {
    const Entry& found = entry(name);
    const std::byte* data = map_->bytes().data() + header_.data_begin + found.begin;
    const auto options = at::TensorOptions().dtype(found.type);
    if (found.begin == found.end) return at::empty(found.shape, options);
    // The format does not promise aligned data; torch's kernels want it.
    if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(found.type) != 0) {
      at::Tensor copy = at::empty(found.shape, options);
      std::memcpy(copy.data_ptr(), data, found.end - found.begin);
      return copy;
    }
    return at::from_blob(
        const_cast<std::byte*>(data), found.shape, [map = map_](void*) {}, options);
  }

  const std::map<std::string, std::string>& metadata() const { return header_.metadata; }

 private:
  const Entry& entry(const std::string& name) const {
    const auto found = header_.entries.find(name);
    CALDERA_CHECK(found != header_.entries.end(), CheckpointError, "{}: no tensor {}", map_->path().string(),
                  name);
    return found->second;
  }

  std::shared_ptr<MappedFile> map_;
  Header header_;
};

}  // namespace

std::unique_ptr<TensorSource> open_safetensors(const fs::path& file) {
  CALDERA_CHECK(fs::is_regular_file(file), CheckpointError, "{}: no such file", file.string());
  return std::make_unique<SafetensorsFile>(file);
}

std::map<std::string, std::string> safetensors_metadata(const fs::path& file) {
  return SafetensorsFile(file).metadata();
}

}  // namespace caldera
