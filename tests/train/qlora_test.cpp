// A stage that trains adapters on weights in 4 bits (QLoRA): near to LoRA, bit for bit when it goes on, and
// what it leaves.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/weights/adapters.h"
#include "tests/train/tiny_run.h"
#include "train/plan.h"

namespace caldera {
namespace {

class QloraStageTest : public TinyRunTest {
 protected:
  Recipe recipe(const std::string& output, const std::string& dtype = "float32", bool in_4bit = true) const {
    Recipe recipe = six_step_recipe(folder_.path(), output);
    StageConfig& stage = recipe.stages[0];
    stage.lora.emplace();
    stage.lora->lora_r = 4;
    stage.lora->lora_alpha = 16;
    stage.lora->load_in_4bit = in_4bit;
    stage.dtype = dtype;
    return recipe;
  }
};

TEST_F(QloraStageTest, LearnsAsLoraDoes) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const std::vector<double> lora = train(recipe(std::string("lora_") + dtype, dtype, false));
    const int64_t num_trainable = num_trainable_;
    const std::vector<double> qlora = train(recipe(std::string("qlora_") + dtype, dtype));
    EXPECT_EQ(num_trainable_, num_trainable);
    EXPECT_LT(qlora.back(), qlora.front() - 0.2);
    EXPECT_NE(qlora[0], lora[0]);  // the weights were rounded
    for (size_t i = 0; i < lora.size(); ++i) EXPECT_NEAR(qlora[i], lora[i], 0.02 * lora[i]) << i;
  }
}

TEST_F(QloraStageTest, StoppedItGoesOnBitForBitAndRecomputingChangesNothing) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const Recipe straight = recipe(std::string("straight_") + dtype, dtype);
    const std::vector<double> expected = train(straight);
    Recipe stopped = recipe(std::string("stopped_") + dtype, dtype),
           recomputed = recipe(std::string("again_") + dtype, dtype);
    int steps = 0;
    std::vector<double> losses = train(stopped, [&] { return ++steps == 3; });
    EXPECT_EQ(losses.size(), 3u);
    const std::vector<double> rest = train(stopped);
    losses.insert(losses.end(), rest.begin(), rest.end());
    EXPECT_EQ(losses, expected);
    EXPECT_EQ(final_weights(stopped), final_weights(straight));
    recomputed.stages[0].gradient_checkpointing = true;
    EXPECT_EQ(train(recomputed), expected);
    EXPECT_EQ(final_weights(recomputed), final_weights(straight));
  }
}

TEST_F(QloraStageTest, TheAdapterIsMergedIntoTheWeightsAsTheyWereRead) {
  const Recipe qlora = recipe("a");
  train(qlora);
  BuildSpec spec = build_spec_of(qlora, 0);
  spec.lora.reset();
  const auto base = build_llava(spec), merged = load_llava(final_of(qlora)).model;
  const Adapter adapter = read_adapter(final_of(qlora));
  int num_merged = 0;
  for (size_t i = 0; i < base->tensors().size(); ++i) {
    const NamedTensor before = base->tensors()[i], after = merged->tensors()[i];
    ASSERT_EQ(before.name, after.name);
    if (before.name.starts_with("multi_modal_projector")) continue;
    at::Tensor expected = before.value().clone();
    const std::string module = before.name.substr(0, before.name.rfind('.'));
    at::Tensor a, b;
    for (const auto& [name, tensor] : adapter.tensors) {
      if (name == module + ".lora_A.weight") a = tensor;
      if (name == module + ".lora_B.weight") b = tensor;
    }
    if (a.defined()) {
      EXPECT_GT(at::mm(b, a).abs().max().item<double>(), 1e-3);
      expected += at::mm(b, a) * (16.0 / 4);
      ++num_merged;
    }
    EXPECT_TRUE(at::allclose(after.value(), expected, 1e-6, 1e-7)) << before.name;
  }
  EXPECT_EQ(num_merged, 14);  // seven layers of two blocks
  const auto from_adapter = load_llava(final_of(qlora) / "adapter").model;
  for (size_t i = 0; i < merged->tensors().size(); ++i)
    EXPECT_TRUE(at::equal(from_adapter->tensors()[i].value(), merged->tensors()[i].value()))
        << merged->tensors()[i].name;
}

TEST_F(QloraStageTest, APlanCountsTheBytesOfFourBits) {
  for (const bool double_quant : {false, true}) {
    Recipe lora = recipe("a", "bfloat16", false), qlora = recipe("a", "bfloat16");
    qlora.stages[0].lora->double_quant = double_quant;
    lora.device = qlora.device = "cuda";  // of the GPU's memory alone: a process first reads all in float32
    const StagePlan wide = plan_recipe(lora).front(), narrow = plan_recipe(qlora).front();
    EXPECT_EQ(narrow.num_parameters, wide.num_parameters);
    EXPECT_EQ(narrow.num_trainable, wide.num_trainable);
    // A block's q and o, k and v, gate and up and down.
    int64_t weights = 0, bytes = 0;
    for (const int64_t count : {32 * 32, 32 * 32, 16 * 32, 16 * 32, 32 * 64, 32 * 64, 32 * 64}) {
      weights += 2 * count;
      bytes += 2 * (count / 2 + (double_quant ? count / 64 + 4 : 4 * count / 64));
    }
    EXPECT_EQ(wide.memory.weights - narrow.memory.weights, 2 * weights - bytes);
    EXPECT_EQ(wide.memory.states, narrow.memory.states);
  }
}

}  // namespace
}  // namespace caldera
