#include "train/metrics.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include "base/files.h"
#include "base/strings.h"
#include "tests/support.h"

namespace caldera {
namespace {

class MetricsTest : public testing::Test {
 protected:
  TemporaryFolder temporary_;
  fs::path folder_ = temporary_.path();
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
  const fs::path path = fs::directory_iterator(folder_)->path();
  const std::string bytes = read_file(path);
  // First record: 9 + 2 + 15 bytes of version event; its length's masked CRC-32C is a known constant of the
  // format.
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  EXPECT_EQ(length, 26u);
  const std::string second = bytes.substr(12 + length + 4);
  uint64_t second_length = 0;
  std::memcpy(&second_length, second.data(), 8);
  EXPECT_EQ(second.size(), 12 + second_length + 4);
  EXPECT_NE(second.find("train/loss"), std::string::npos);
}

}  // namespace caldera
