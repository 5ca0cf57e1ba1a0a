// The activations that are written: their names, that they are the forward pass's own, and that nothing is
// recorded otherwise. Their values against transformers' are the business of tests/parity/taps.py.
#include "eval/taps.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "model/taps.h"
#include "tests/model/tiny_llava.h"

namespace caldera {
namespace {

using testing::ElementsAre;

TEST(Taps, AreTheForwardPassInItsOrder) {
  const auto model = make_tiny_llava();
  const PackedBatch batch = make_batch({{1, kImage, kImage, kImage, kImage, 5, 6}, {1, 7, 8}});
  const TensorList taps = record_taps(*model, batch);
  std::vector<std::string> names;
  std::map<std::string, at::Tensor> values;
  for (const auto& [name, value] : taps) {
    names.push_back(name);
    values[name] = value;
  }
  EXPECT_THAT(names,
              ElementsAre("input_ids", "position_ids", "cu_seqlens", "pixels", "vision_tower",
                          "multi_modal_projector", "language_model.embeddings", "language_model.layers.0",
                          "language_model.layers.1", "language_model.norm", "logits"));
  EXPECT_EQ(values["multi_modal_projector"].sizes(), at::IntArrayRef({4, 32}));
  EXPECT_EQ(values["language_model.layers.1"].sizes(), at::IntArrayRef({10, 32}));
  EXPECT_TRUE(at::equal(values["cu_seqlens"], at::tensor({0, 7, 10}, at::kLong)));
  EXPECT_TRUE(at::equal(values["logits"], model->logits(batch)));
  EXPECT_TRUE(
      at::equal(values["language_model.embeddings"].narrow(0, 1, 4), values["multi_modal_projector"]));
  EXPECT_TRUE(
      at::equal(at::linear(values["language_model.norm"], model->language->head_weight()), values["logits"]));
}

TEST(Taps, WithoutPicturesTheTowerIsNotThere) {
  const auto model = make_tiny_llava();
  for (const auto& [name, value] : record_taps(*model, make_batch({{1, 5, 6}})))
    EXPECT_TRUE(name != "pixels" && !name.starts_with("vision_tower") && name != "multi_modal_projector")
        << name;
}

TEST(Taps, NothingIsRecordedWithoutARecorder) {
  int64_t count = 0;
  const auto model = make_tiny_llava();
  const PackedBatch batch = make_batch({{1, 5, 6}});
  {
    const TapRecorder recorder([&count](const std::string&, const at::Tensor&) { ++count; });
    model->logits(batch);
  }
  EXPECT_EQ(count, 5);
  model->logits(batch);
  EXPECT_EQ(count, 5);
}

}  // namespace
}  // namespace caldera
