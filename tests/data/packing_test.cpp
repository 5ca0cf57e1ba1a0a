#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/aten.h"
#include "tests/data/fake_text.h"

namespace caldera {
namespace {

using ::testing::ElementsAre;

std::vector<int64_t> values(const at::Tensor& tensor) {
  EXPECT_EQ(tensor.scalar_type(), at::kLong);
  return {tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel()};
}

}  // namespace

TEST(Packing, SamplesStandInOneRow) {
  const fs::path pictures = fs::path(CALDERA_SOURCE_DIR) / "tests/golden/image";
  const SampleFormat format = fake_format(8, 2);
  const std::vector<Sample> samples = {
      make_sample(fake_record("one", "A", "b"), pictures, format),
      make_sample(fake_record("two", "<image>\nC", "de", {"rgb.png"}), pictures, format)};
  const PackedBatch batch = pack(samples);
  EXPECT_EQ(batch.num_samples(), 2);
  EXPECT_EQ(batch.num_tokens(), 10);
  EXPECT_THAT(batch.cu_seqlens, ElementsAre(0, 3, 10));
  EXPECT_THAT(values(batch.input_ids_T), ElementsAre('A', 'b', 256, -200, -200, '\n', 'C', 'd', 'e', 256));
  EXPECT_THAT(values(batch.position_ids_T), ElementsAre(0, 1, 2, 0, 1, 2, 3, 4, 5, 6));
  EXPECT_THAT(values(batch.supervised_K), ElementsAre(0, 1, 6, 7, 8));
  EXPECT_THAT(values(batch.targets_K), ElementsAre('b', 256, 'd', 'e', 256));
  EXPECT_THAT(batch.num_supervised, ElementsAre(2, 3));
  EXPECT_THAT(values(batch.image_rows_IP), ElementsAre(3, 4));
  EXPECT_EQ(batch.pixels_ICYX.sizes(), (at::IntArrayRef{1, 3, 8, 8}));
  EXPECT_THAT(batch.sample_ids, ElementsAre("one", "two"));
}

TEST(Packing, ALearnedFirstTokenIsNotTheLastSamplesTarget) {
  Sample sample;
  sample.input_ids = sample.labels = {7, 8};
  const PackedBatch batch = pack({sample, sample});
  EXPECT_THAT(values(batch.supervised_K), ElementsAre(0, 2));
  EXPECT_THAT(values(batch.targets_K), ElementsAre(8, 8));
  EXPECT_THAT(batch.num_supervised, ElementsAre(1, 1));
}

TEST(Packing, ForTheLossWhatNoSupervisedRowSeesIsLeftOut) {
  const auto picture = [](int value) { return at::full({3, 4, 4}, value, at::kByte); };
  Sample behind;  // a picture of two ids, an answer of two, and another picture behind them
  behind.input_ids = {1, -200, -200, 5, 6, 7, -200, -200, 8};
  behind.labels = {-100, -100, -100, -100, 6, 7, -100, -100, -100};
  behind.pixels = {picture(1), picture(2)};
  Sample none;  // nothing to learn: whole
  none.input_ids = {3, -200, -200};
  none.labels = {-100, -100, -100};
  none.pixels = {picture(3)};
  Sample text;
  text.input_ids = text.labels = {7, 8};
  const PackedBatch whole = pack({behind, none, text}), batch = pack({behind, none, text}, /*for_loss=*/true);
  EXPECT_THAT(whole.cu_seqlens, ElementsAre(0, 9, 12, 14));
  EXPECT_THAT(batch.cu_seqlens, ElementsAre(0, 5, 8, 9));
  EXPECT_THAT(values(batch.input_ids_T), ElementsAre(1, -200, -200, 5, 6, 3, -200, -200, 7));
  EXPECT_THAT(values(batch.position_ids_T), ElementsAre(0, 1, 2, 3, 4, 0, 1, 2, 0));
  EXPECT_THAT(values(batch.supervised_K), ElementsAre(3, 4, 8));
  EXPECT_THAT(values(batch.targets_K), ElementsAre(6, 7, 8));
  EXPECT_EQ(values(batch.targets_K), values(whole.targets_K));
  EXPECT_EQ(batch.num_supervised, whole.num_supervised);
  EXPECT_THAT(values(batch.image_rows_IP), ElementsAre(1, 2, 6, 7));
  EXPECT_EQ(whole.num_images(), 3);
  ASSERT_EQ(batch.num_images(), 2);
  EXPECT_EQ(batch.pixels_ICYX.select(1, 0).select(1, 0).select(1, 0).sum().item<int64_t>(), 1 + 3);
}

TEST(Packing, TextAloneHasNoImages) {
  const PackedBatch batch = pack({make_sample_text(fake_record("one", "A", "b"), fake_format())});
  EXPECT_EQ(batch.num_images(), 0);
  EXPECT_EQ(batch.pixels_ICYX.scalar_type(), at::kByte);
  EXPECT_EQ(batch.image_rows_IP.numel(), 0);
}

TEST(Packing, MicroBatchesAreFirstFitDecreasing) {
  using Plan = std::vector<std::vector<int64_t>>;
  EXPECT_EQ(plan_micro_batches({4, 8, 1, 4, 2, 1}, 10), (Plan{{0, 2, 3, 5}, {1, 4}}));
  EXPECT_EQ(plan_micro_batches({5, 5, 5}, 10), (Plan{{0, 1}, {2}}));   // ties by position
  EXPECT_EQ(plan_micro_batches({3, 25, 3}, 10), (Plan{{0, 2}, {1}}));  // too long for any: one of its own
  EXPECT_EQ(plan_micro_batches({}, 10), Plan{});
}

}  // namespace caldera
