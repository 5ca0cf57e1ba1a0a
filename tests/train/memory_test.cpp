// What a stage may do to take less memory: budgets that recompute blocks, 8-bit states, no masters.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "base/error.h"
#include "base/log.h"
#include "model/ops/frozen_weights.h"
#include "tests/train/tiny_run.h"
#include "train/plan_memory.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

class MemoryTest : public TinyRunTest {
 protected:
  void SetUp() override {
    TinyRunTest::SetUp();
    previous_ = set_log_sink([this](LogLevel, const std::string& line) { log_ += line + "\n"; });
  }
  void TearDown() override { set_log_sink(previous_); }

  Recipe recipe(const std::string& output) const { return six_step_recipe(folder_.path(), output); }
  // The total with so many halves of blocks recomputing, apart from the program.
  int64_t bytes_with(const Recipe& recipe, int64_t recomputed_halves, const RankSplit& ranks = {}) const {
    return bytes_with(recipe, MemoryChoices{.recomputed_halves = recomputed_halves}, ranks);
  }
  int64_t bytes_with(const Recipe& recipe, const MemoryChoices& choices, const RankSplit& ranks = {}) const {
    const StageConfig& stage = recipe.stages[0];
    return plan_memory(plan_model(recipe, stage), recipe, stage, plan_stage(recipe, stage), false, 0,
                       choices, ranks)
        .total();
  }

  std::string log_;
  LogSink previous_;
};

TEST_F(MemoryTest, ABudgetRecomputesAsManyBlocksAsItTakesAndChangesNoBit) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "under sanitizers the program grows by more than the budgets differ";
#endif
  const Recipe plain = recipe("plain");
  const std::vector<double> losses = train(plain);
  for (const auto& [halves, said] :
       {std::pair{1, "stage finetune: 1 of 2 blocks recompute their MLP, 0 of them the rest as well"},
        {3, "stage finetune: 2 of 2 blocks recompute their MLP, 1 of them the rest as well"}}) {
    // Between what one half fewer takes and what this many do.
    ASSERT_GT(bytes_with(plain, halves - 1), bytes_with(plain, halves)) << halves;
    const int64_t saved = bytes_with(plain, 0) - (bytes_with(plain, halves - 1) + bytes_with(plain, halves)) / 2;
    Recipe budget = recipe(fmt::format("budget_{}", halves));
    const MemoryPlan planned = plan_stage(budget, budget.stages[0]).memory;  // by the program as it is now
    const int64_t total = planned.total() - planned.packed;
    budget.stages[0].memory.budget_gb = static_cast<double>(total - saved) / 1e9;
    EXPECT_EQ(losses, train(budget));
    EXPECT_THAT(log_, HasSubstr(said));
    EXPECT_EQ(final_weights(plain), final_weights(budget));
  }
  Recipe roomy = recipe("roomy");
  roomy.stages[0].memory.budget_gb = 1000;
  EXPECT_EQ(losses, train(roomy));
  EXPECT_THAT(log_, HasSubstr("0 of 2 blocks recompute their MLP"));
}

// Copies of frozen weights are the first that a budget does without.
TEST_F(MemoryTest, ABudgetDropsCopiesBeforeAnythingRecomputes) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "under sanitizers the program grows by more than the budgets differ";
#endif
  Recipe plain = recipe("plain");
  plain.stages[0].trainable = {"projector"};
  const std::vector<double> losses = train(plain);
  Recipe budget = plain;
  budget.output = recipe("budget").output;
  StagePlan planned = plan_stage(budget, budget.stages[0]);
  if (frozen_bytes_each(at::kFloat, /*forward_only=*/true) == 0) {
    EXPECT_FALSE(planned.choices.packs_frozen);
    return;
  }
  ASSERT_TRUE(planned.choices.packs_frozen);
  ASSERT_GT(planned.memory.packed, 0);
  budget.stages[0].memory.budget_gb = static_cast<double>(planned.memory.total() - planned.memory.packed / 2) / 1e9;
  EXPECT_EQ(losses, train(budget));
  EXPECT_THAT(log_, HasSubstr("0 of 2 blocks recompute their MLP"));
  EXPECT_EQ(final_weights(plain), final_weights(budget));
  planned = plan_stage(budget, budget.stages[0]);
  EXPECT_FALSE(planned.choices.packs_frozen);
  EXPECT_EQ(planned.memory.packed, 0);
}

TEST_F(MemoryTest, ABudgetThatNothingKeepsSaysWhatHelps) {
  Recipe tight = recipe("tight");
  tight.stages[0].memory.budget_gb = 1e-3;
  const auto run = [&] { train(tight); };
  EXPECT_THAT(
      run, ThrowsMessage<ConfigError>(HasSubstr("stage finetune: memory.budget_gb is 0.001, but with all 2 "
                                                "blocks recomputing it still takes")));
  EXPECT_THAT(run, ThrowsMessage<ConfigError>(HasSubstr("dtype: bfloat16")));
  EXPECT_THAT(run, ThrowsMessage<ConfigError>(HasSubstr("optimizer.optim: adamw_8bit")));
  tight.stages[0].dtype = "bfloat16";
  EXPECT_THAT(run, ThrowsMessage<ConfigError>(HasSubstr("optimizer.master_weights: none")));
}

TEST_F(MemoryTest, PlansCountWhatEachSettingSaves) {
  Recipe changed = recipe("a");
  StageConfig& stage = changed.stages[0];
  stage.dtype = "bfloat16";
  const MemoryPlan before = plan_stage(changed, stage).memory;
  stage.optimizer.optim = "adamw_8bit";
  stage.optimizer.master_weights = "none";
  const MemoryPlan after = plan_stage(changed, stage).memory;
  EXPECT_LT(after.states, before.states);
  EXPECT_GT(before.masters, 0);
  EXPECT_EQ(after.masters, 0);
  const int64_t alone = bytes_with(changed, 0);
  changed.distributed.strategy = "zero3";
  EXPECT_LT(bytes_with(changed, 4, {.num_shards = 4}), alone);
}

// Every form of state and master: the run goes on bit for bit from its checkpoint, and learns as with
// float32.
TEST_F(MemoryTest, CompactStatesResumeBitForBitAndLearnAlike) {
  struct Case {
    const char *name, *dtype, *optim, *masters;
  };
  for (const Case& c : {Case{"a", "float32", "adamw_8bit", "float32"},
                        {"b", "bfloat16", "adamw_8bit", "float32"},
                        {"c", "bfloat16", "adamw_torch", "none"},
                        {"d", "bfloat16", "adamw_8bit", "none"}}) {
    Recipe reference = recipe(std::string("reference_") + c.name);
    StageConfig& stage = reference.stages[0];
    stage.max_steps = 30;
    stage.dtype = c.dtype;
    const std::vector<double> expected = train(reference);
    stage.optimizer.optim = c.optim;
    stage.optimizer.master_weights = c.masters;
    Recipe straight = reference, stopped = reference;
    straight.output = recipe(std::string("straight_") + c.name).output;
    stopped.output = recipe(std::string("stopped_") + c.name).output;
    const std::vector<double> losses = train(straight);
    EXPECT_NE(losses, expected) << c.name;
    const auto mean = [](const std::vector<double>& list) {
      return std::accumulate(list.begin(), list.end(), 0.0) / static_cast<double>(list.size());
    };
    EXPECT_NEAR(mean(losses), mean(expected), 0.03 * mean(expected)) << c.name;

    int steps = 0;
    std::vector<double> both = train(stopped, [&] { return ++steps == 7; });
    const std::vector<double> rest = train(stopped);
    both.insert(both.end(), rest.begin(), rest.end());
    EXPECT_EQ(both, losses) << c.name;
    EXPECT_EQ(final_weights(stopped), final_weights(straight)) << c.name;
  }
}

}  // namespace
}  // namespace caldera
