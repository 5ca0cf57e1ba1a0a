#include "train/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <csignal>

#include "base/files.h"
#include "base/log.h"
#include "base/strings.h"
#include "tests/support.h"

namespace caldera {
namespace {

class MetricsTest : public testing::Test {
 protected:
  TemporaryFolder temporary_;
  fs::path folder_ = temporary_.path();
};

// The records of a TFRecord file.
std::vector<std::string> records_of(const std::string& bytes) {
  std::vector<std::string> records;
  for (size_t at = 0; at < bytes.size();) {
    uint64_t length = 0;
    std::memcpy(&length, bytes.data() + at, 8);
    records.push_back(bytes.substr(at + 12, length));
    at += 12 + length + 4;
    EXPECT_LE(at, bytes.size());
  }
  return records;
}

// No file of this process grows beyond so many bytes: as a full disk, but for the reason.
class SmallDisk {
 public:
  explicit SmallDisk(uint64_t num_bytes) : previous_(std::signal(SIGXFSZ, SIG_IGN)) {
    ::getrlimit(RLIMIT_FSIZE, &limit_);
    const rlimit small = {.rlim_cur = num_bytes, .rlim_max = limit_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &small);
  }
  ~SmallDisk() {
    ::setrlimit(RLIMIT_FSIZE, &limit_);
    std::signal(SIGXFSZ, previous_);
  }

 private:
  rlimit limit_{};
  void (*previous_)(int);
};

}  // namespace

TEST_F(MetricsTest, ResumingDropsLaterAndHalfWrittenLines) {
  {
    MetricsLog log(folder_, 0);
    for (int64_t step = 1; step <= 5; ++step)
      log.step({.step = step, .loss = 1.0 / static_cast<double>(step)});
    log.evaluation(5, 0.5);
  }
  const fs::path path = folder_ / "metrics.jsonl";
  write_file_atomic(path, read_file(path) + "{\"step\": 6, \"lo");
  { MetricsLog log(folder_, 3); }
  const auto lines = split(read_file(path), "\n");
  ASSERT_EQ(lines.size(), 4u);  // three and the end
  EXPECT_EQ(Json::parse(lines[2])["step"], 3);
  EXPECT_EQ(Json::parse(lines[2])["loss"].get<double>(), 1.0 / 3);
}

TEST_F(MetricsTest, EventFileIsFramedAsTfRecord) {
  {
    TensorBoardWriter writer(folder_, 0);
    writer.scalars(7, {{"train/loss", 2.5}});
  }
  const std::string bytes = read_file(fs::directory_iterator(folder_)->path());
  // First record: 9 + 2 + 15 bytes of version event; its length's masked CRC-32C is a known constant of the
  // format.
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  EXPECT_EQ(length, 26u);
  const std::vector<std::string> records = records_of(bytes);
  ASSERT_EQ(records.size(), 3u);
  EXPECT_THAT(records[2], testing::HasSubstr("train/loss"));
}

// A run that was cut off before its first checkpoint begins anew in the same folder.
TEST_F(MetricsTest, EventFilesVoidWhatEarlierOnesSayOfLaterSteps) {
  for (const int64_t first_step : {0, 100}) {
    const TemporaryFolder folder;
    { TensorBoardWriter writer(folder.path(), first_step); }
    const std::vector<std::string> records =
        records_of(read_file(fs::directory_iterator(folder.path())->path()));
    ASSERT_EQ(records.size(), 2u);
    // After the time: the step, a varint of field 2, and SessionLog{status: START} in field 7.
    const std::string expected = {0x10, static_cast<char>(first_step + 1), 0x3A, 0x02, 0x08, 0x01};
    EXPECT_EQ(records[1].substr(9), expected) << first_step;
  }
}

TEST_F(MetricsTest, AFullDiskLeavesOutWholeLinesAndSaysSoOnce) {
  std::vector<std::string> warnings;
  const LogSink previous =
      set_log_sink([&](LogLevel, const std::string& line) { warnings.push_back(line); });
  const fs::path path = folder_ / "metrics.jsonl";
  {
    MetricsLog log(folder_, 0);
    log.step({.step = 1});
    const uint64_t line = fs::file_size(path);
    {
      const SmallDisk disk(line + line / 2);
      for (int64_t step = 2; step <= 4; ++step) log.step({.step = step});
      EXPECT_EQ(fs::file_size(path), line);
    }
    log.step({.step = 5});
  }
  set_log_sink(previous);
  const auto lines = split(read_file(path), "\n");
  ASSERT_EQ(lines.size(), 3u);  // two and the end
  EXPECT_EQ(Json::parse(lines[1])["step"], 5);
  EXPECT_EQ(std::count_if(warnings.begin(), warnings.end(),
                          [](const std::string& line) { return line.find("jsonl: cannot") != line.npos; }),
            1);
  for (const auto& entry : fs::directory_iterator(folder_))
    if (entry.path() != path) records_of(read_file(entry.path()));
}

}  // namespace caldera
