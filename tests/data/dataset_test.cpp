#include "data/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/aten.h"
#include "tests/data/fake_text.h"
#include "tests/support.h"

namespace caldera {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kImage = kImageTokenIndex, kIgnore = kIgnoreIndex;

}  // namespace

TEST(Dataset, ImagesExpandAndAnswersAreLearned) {
  const Sample sample = make_sample_text(fake_record("r", "<image>\nA", "b", {"x.png"}), fake_format(8, 3));
  EXPECT_THAT(sample.input_ids, ElementsAre(kImage, kImage, kImage, '\n', 'A', 'b', 256));
  EXPECT_THAT(sample.labels, ElementsAre(kIgnore, kIgnore, kIgnore, kIgnore, kIgnore, 'b', 256));
  EXPECT_EQ(sample.num_supervised(), 2);
  EXPECT_TRUE(sample.pixels.empty());
}

TEST(Dataset, TextIsCutAtTheMaximum) {
  const Sample sample = make_sample_text(fake_record("r", "AB", "cdef"), fake_format(8, 3, 4));
  EXPECT_THAT(sample.input_ids, ElementsAre('A', 'B', 'c', 'd'));
  EXPECT_EQ(sample.num_supervised(), 2);
}

TEST(Dataset, AnImageIsKeptWholeOrNotAtAll) {
  const Record record = fake_record("r", "A<image>B<image>C", "d", {"rgb.png", "rgb.jpg"});
  const auto length = [&](int64_t max_length) {
    const Sample sample = make_sample(record, kGoldenPictures, fake_format(8, 3, max_length));
    return std::pair(sample.input_ids.size(), sample.pixels.size());
  };
  EXPECT_EQ(length(3), std::pair(size_t{1}, size_t{0}));
  EXPECT_EQ(length(4), std::pair(size_t{4}, size_t{1}));
  EXPECT_EQ(length(7), std::pair(size_t{5}, size_t{1}));  // the second image and all that follows
  EXPECT_EQ(length(8), std::pair(size_t{8}, size_t{2}));
  EXPECT_EQ(length(100), std::pair(size_t{11}, size_t{2}));
}

TEST(Dataset, PicturesAreTowersPixels) {
  const Sample sample =
      make_sample(fake_record("r", "<image>", "a", {"rgb.png"}), kGoldenPictures, fake_format(8));
  ASSERT_EQ(sample.pixels.size(), 1u);
  EXPECT_EQ(sample.pixels[0].sizes(), (at::IntArrayRef{3, 8, 8}));
  EXPECT_EQ(sample.pixels[0].scalar_type(), at::kByte);
}

TEST(Dataset, ErrorsNameTheRecordAndTheFile) {
  const auto message = [](const std::string& image) {
    return error_of<DataError>(
        [&] { make_sample(fake_record("r5", "<image>", "a", {image}), kGoldenPictures, fake_format()); });
  };
  EXPECT_THAT(message("missing.png"), AllOf(HasSubstr("record \"r5\""), HasSubstr("missing.png")));
  EXPECT_THAT(message("resize.bin"),
              AllOf(HasSubstr("record \"r5\""), HasSubstr("resize.bin"), HasSubstr("not a picture")));
  EXPECT_THAT(message("../../x.png"), AllOf(HasSubstr("record \"r5\""), HasSubstr("\"..\"")));
  EXPECT_THAT(error_of<DataError>(
                  [] { make_sample(fake_record("r6", "<image>", "a"), kGoldenPictures, fake_format()); }),
              AllOf(HasSubstr("record \"r6\""), HasSubstr("only 0 images")));
}

TEST(Dataset, TheCacheKeepsPixelsUpToItsSize) {
  PixelCache cache(3 * 8 * 8);
  const Record first = fake_record("r", "<image>", "a", {"rgb.png"}),
               second = fake_record("s", "<image>", "a", {"rgb.jpg"});
  const Sample a = make_sample(first, kGoldenPictures, fake_format(8), &cache);
  make_sample(second, kGoldenPictures, fake_format(8), &cache);
  EXPECT_TRUE(cache.find("rgb.png").is_same(a.pixels[0]));
  EXPECT_FALSE(cache.find("rgb.jpg").defined());
  EXPECT_TRUE(make_sample(first, kGoldenPictures, fake_format(8), &cache).pixels[0].is_same(a.pixels[0]));
}

TEST(Dataset, FindsTheRecordsThatAreCutToNothing) {
  std::vector<Record> records;
  for (int i = 0; i < 400; ++i)
    records.push_back(fake_record(fmt::format("r{}", i), std::string(i % 30 == 7 ? 50 : 20, 'q'), "x"));
  const SampleFormat format = fake_format(8, 4, /*max_length=*/40);
  std::vector<int64_t> calls;
  const std::vector<size_t> places =
      cut_to_nothing(records, format, [&](int64_t num_seen) { calls.push_back(num_seen); });
  ASSERT_EQ(places.size(), 14u);
  for (size_t i = 0; i < places.size(); ++i) EXPECT_EQ(places[i], 7 + 30 * i);
  EXPECT_EQ(calls.front(), 0);
  EXPECT_EQ(calls.back(), 400);
  const std::string message = cut_to_nothing_message(records, places, "d.json", format);
  EXPECT_THAT(message,
              ::testing::StartsWith("d.json: 14 of 400 records are longer than model_max_length 40"));
  EXPECT_THAT(message, ::testing::HasSubstr(", the first of them: 7 (id \"r7\"), 37 (id \"r37\")"));
  EXPECT_EQ(message.find("r307"), std::string::npos);  // the eleventh
  EXPECT_TRUE(cut_to_nothing(records, fake_format(8, 4, 60)).empty());
  EXPECT_TRUE(cut_to_nothing({}, format).empty());
}

}  // namespace caldera
