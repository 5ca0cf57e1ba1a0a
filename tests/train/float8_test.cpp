// A stage whose products are in 8-bit floats: it learns nearly the same, and goes on bit for bit.
#include <gtest/gtest.h>

#include "tests/train/tiny_run.h"

namespace caldera {
namespace {

class Float8StageTest : public TinyRunTest {
 protected:
  Recipe recipe(const std::string& output, bool float8 = true) const {
    Recipe recipe = six_step_recipe(folder_.path(), output);
    recipe.stages[0].dtype = "bfloat16";
    recipe.stages[0].float8 = float8;
    return recipe;
  }
};

TEST_F(Float8StageTest, LearnsNearlyTheSame) {
  for (const bool lora : {false, true}) {
    Recipe plain = recipe(lora ? "plain_lora" : "plain", false),
           float8 = recipe(lora ? "float8_lora" : "float8");
    if (lora) plain.stages[0].lora.emplace().lora_r = float8.stages[0].lora.emplace().lora_r = 4;
    const std::vector<double> expected = train(plain), losses = train(float8);
    EXPECT_NE(losses, expected);
    EXPECT_LT(losses.back(), losses.front() - 0.2);
    for (size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(losses[i], expected[i], 0.1 * expected[i]) << i;
  }
}

TEST_F(Float8StageTest, StoppedItGoesOnBitForBitAndRecomputingChangesNothing) {
  const std::vector<double> expected = train(recipe("straight"));
  int steps = 0;
  std::vector<double> losses = train(recipe("stopped"), [&] { return ++steps == 3; });
  const std::vector<double> rest = train(recipe("stopped"));
  losses.insert(losses.end(), rest.begin(), rest.end());
  EXPECT_EQ(losses, expected);
  EXPECT_EQ(final_weights(recipe("stopped")), final_weights(recipe("straight")));
  Recipe recomputed = recipe("again");
  recomputed.stages[0].gradient_checkpointing = true;
  EXPECT_EQ(train(recomputed), expected);
}

}  // namespace
}  // namespace caldera
