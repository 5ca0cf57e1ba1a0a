#include "model/llava.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>

#include "model/taps.h"
#include "tests/model/tiny_llava.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

TEST(Llava, ImageFeaturesTakeTheirRows) {
  const auto model = make_tiny_llava();
  const PackedBatch batch =
      make_batch({{1, kImage, kImage, kImage, kImage, 5}, {7, kImage, kImage, kImage, kImage}});
  const at::Tensor x = model->embed(batch), features = model->image_features(batch.pixels_ICYX);
  EXPECT_EQ(features.sizes(), (std::vector<int64_t>{8, 32}));
  EXPECT_TRUE(at::equal(x.index_select(0, batch.image_rows_IP), features));
  const at::Tensor text = at::tensor({0, 5, 6}, at::kLong);
  EXPECT_TRUE(at::equal(x.index_select(0, text), model->language->embed(at::tensor({1, 5, 7}, at::kLong))));
}

// The features are copied into the row: backward needs nothing of them.
TEST(Llava, ProjectedFeaturesAreNotKept) {
  const auto model = make_tiny_llava();
  set_trainable(model->tensors(), true);
  std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> projected;
  at::Tensor x;
  {
    const TapRecorder recorder([&](const std::string& name, const at::Tensor& value) {
      if (name == "multi_modal_projector") projected = value.storage().getWeakStorageImpl();
    });
    x = model->embed(make_batch({{1, kImage, kImage, kImage, kImage, 5}}));
  }
  ASSERT_TRUE(projected);
  EXPECT_TRUE(projected->expired());
  x.sum().backward();
  for (const NamedTensor& tensor : model->component_tensors("projector")) EXPECT_TRUE(tensor.grad().defined());
}

TEST(Llava, LossIsThatOfTheLogits) {
  const auto model = make_tiny_llava();
  const PackedBatch batch = make_batch({{1, kImage, kImage, kImage, kImage, 5, 9}, {7, 3, 30}});
  const at::Tensor log_p = model->logits(batch).log_softmax(-1).index_select(0, batch.supervised_K);
  const at::Tensor expected = -log_p.gather(1, batch.targets_K.unsqueeze(1)).squeeze(1);
  EXPECT_TRUE(at::allclose(model->nll(batch), expected, 1e-5));
  EXPECT_TRUE(at::allclose(model->loss_sum(batch), expected.sum(), 1e-5));
}

TEST(Llava, APackedSampleKeepsTheLossThatItHasAlone) {
  const auto model = make_tiny_llava();
  const std::vector<int64_t> first = {4, 8, 15, 16, 23}, second = {1, 2, 3, 39};
  const at::Tensor together = model->nll(make_batch({first, second}));
  const at::Tensor apart = at::cat({model->nll(make_batch({first})), model->nll(make_batch({second}))});
  EXPECT_TRUE(at::allclose(together, apart, 1e-5));
}

TEST(Llava, OnlyWhatTrainsGetsAGraph) {
  const auto model = make_tiny_llava();
  const PackedBatch batch = make_batch({{1, kImage, kImage, kImage, kImage, 5, 9}});
  set_trainable(model->component_tensors("projector"), true);
  model->loss_sum(batch).backward();
  for (const NamedTensor& tensor : model->tensors()) {
    const bool projector = tensor.name.starts_with("multi_modal_projector.");
    EXPECT_EQ(tensor.grad().defined(), projector) << tensor.name;
  }
  set_trainable(model->component_tensors("vision_tower"), true);
  model->loss_sum(batch).backward();
  EXPECT_TRUE(model->vision->tensors()[0].grad().defined());
}

TEST(Llava, BatchesWithoutImagesOrWithoutTargetsWork) {
  const auto model = make_tiny_llava();
  set_trainable(model->tensors(), true);
  PackedBatch batch = make_batch({{4, 8, 15}});
  batch.pixels_ICYX = at::Tensor();  // as a text-only loader may leave it
  batch.image_rows_IP = at::Tensor();
  EXPECT_GT(model->loss_sum(batch).item<float>(), 0);
  batch.supervised_K = batch.targets_K = at::empty({0}, at::kLong);
  const at::Tensor zero = model->loss_sum(batch);
  EXPECT_EQ(zero.item<float>(), 0);
  zero.backward();  // a rank without targets still takes part: zero gradients
  EXPECT_EQ(model->language->tensors()[2].grad().abs().max().item<float>(), 0);
}

TEST(Llava, TensorsCarryHfsClassicNames) {
  const auto model = make_tiny_llava();
  const NamedTensors tensors = model->tensors();
  EXPECT_EQ(tensors[0].name, "vision_tower.weight");
  EXPECT_EQ(tensors[1].name, "multi_modal_projector.linear_1.weight");
  EXPECT_EQ(tensors[5].name, "language_model.model.embed_tokens.weight");
  EXPECT_EQ(tensors.back().name, "language_model.lm_head.weight");
  EXPECT_THAT([&] { model->component_tensors("projecter"); },
              ThrowsMessage<Error>(HasSubstr("\"projecter\" is not known; did you mean \"projector\"?")));
}

TEST(Llava, ConvertsInPlaceAndKeepsWhatTrains) {
  const auto model = make_tiny_llava();
  set_trainable(model->component_tensors("projector"), true);
  const at::Tensor before = model->nll(make_batch({{1, kImage, kImage, kImage, kImage, 5, 9}}));
  model->to(at::kCPU, at::kBFloat16);
  EXPECT_EQ(model->dtype(), at::kBFloat16);
  for (const NamedTensor& tensor : model->tensors())
    EXPECT_EQ(tensor.owner->requires_grad(), tensor.name.starts_with("multi_modal_projector."))
        << tensor.name;
  const at::Tensor after = model->nll(make_batch({{1, kImage, kImage, kImage, kImage, 5, 9}}));
  EXPECT_TRUE(at::allclose(after, before, 0.05, 0.05));
}

TEST(Llava, RefusesBatchesThatDoNotFit) {
  const auto model = make_tiny_llava();
  PackedBatch batch = make_batch({{1, kImage, kImage, kImage, kImage, 5}});
  batch.image_rows_IP = batch.image_rows_IP.narrow(0, 0, 3);
  EXPECT_THAT([&] { model->embed(batch); },
              ThrowsMessage<DataError>(HasSubstr("keeps 3 rows for the features of 1 images")));
  batch.pixels_ICYX = at::Tensor();
  EXPECT_THAT([&] { model->embed(batch); }, ThrowsMessage<DataError>(HasSubstr("holds no image")));
  EXPECT_THAT(
      [&] {
        model->embed(make_batch({{1, 40}}));
      },
      ThrowsMessage<DataError>(HasSubstr("token id 40 lies outside the model's vocabulary of 40")));
  EXPECT_THAT(
      [&] {
        model->embed(make_batch({{1, -7}}));
      },
      ThrowsMessage<DataError>(HasSubstr("token id -7")));
}

}  // namespace
}  // namespace caldera
