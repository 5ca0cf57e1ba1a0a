#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/data/fake_text.h"

namespace caldera {
namespace {

using ::testing::HasSubstr;

TEST(CheckImages, LooksAtEachNameOnceAndShowsSignsOfLife) {
  const TemporaryFolder folder;
  folder.write("a.png", read_file(fs::path(CALDERA_SOURCE_DIR) / "tests/golden/image/rgb.png"));
  std::vector<Record> records;
  for (int i = 0; i < 2500; ++i)
    records.push_back(fake_record(fmt::format("r{}", i), "<image>", "a", {"a.png"}));
  int num_calls = 0;
  const auto progress = [&] {
    if (++num_calls == 2) fs::remove(folder.path() / "a.png");  // has been looked at
  };
  EXPECT_NO_THROW(check_images(records, folder.path(), "d.json", progress));
  EXPECT_EQ(num_calls, 2);  // before the first pictures, and behind the last
  // What is wrong is said of each record that shows it.
  EXPECT_THAT(error_of<DataError>([&] { check_images(records, folder.path(), "d.json"); }),
              AllOf(HasSubstr("d.json: 2500 images cannot be used"), HasSubstr("record 0 (id \"r0\")"),
                    HasSubstr("record 9 (id \"r9\")")));
}

}  // namespace
}  // namespace caldera
