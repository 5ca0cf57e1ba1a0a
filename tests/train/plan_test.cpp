// What a plan counts, held against the run itself; and the profile of a run.
#include "train/plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "base/files.h"
#include "base/json.h"
#include "tests/train/tiny_run.h"
#include "train/profile.h"
#include "train/scaling.h"

namespace caldera {
namespace {

struct Counter : TrainingObserver {
  void on_stage(const StageStart& stage) override { start = stage; }
  void on_step(const StepMetrics& step) override {
    num_tokens += step.num_tokens;
    num_supervised += step.num_supervised;
    num_images += step.num_images;
  }
  StageStart start;
  int64_t num_tokens = 0, num_supervised = 0, num_images = 0;
};

class PlanTest : public testing::Test {
 protected:
  void SetUp() override {
    write_tiny_run(folder_.path());
    recipe_ = tiny_recipe(folder_.path(), "run");
  }

  TemporaryFolder folder_;
  Recipe recipe_;
};

TEST_F(PlanTest, CountsWhatOneEpochTakes) {
  const StagePlan plan = plan_recipe(recipe_).front();
  Counter counter;
  run_recipe(recipe_, {}, counter, [] { return 0; });
  EXPECT_EQ(plan.num_steps, counter.start.num_steps);
  EXPECT_EQ(plan.num_samples, counter.start.num_samples);
  EXPECT_EQ(plan.num_parameters, counter.start.num_parameters);
  EXPECT_EQ(plan.num_trainable, counter.start.num_trainable);
  EXPECT_EQ(plan.num_tokens, counter.num_tokens);
  EXPECT_EQ(plan.num_supervised, counter.num_supervised);
  EXPECT_EQ(plan.num_images, counter.num_images);
}

TEST_F(PlanTest, WeightsMastersAndStatesFollowTheDtype) {
  const StagePlan wide = plan_recipe(recipe_).front();
  recipe_.stages[0].dtype = "bfloat16";
  const StagePlan narrow = plan_recipe(recipe_).front();
  EXPECT_EQ(wide.memory.masters, 0);
  EXPECT_EQ(narrow.memory.masters, 2 * narrow.num_trainable);
  EXPECT_EQ(wide.memory.states, 8 * wide.num_trainable);
  EXPECT_EQ(2 * narrow.memory.weights, wide.memory.weights);
}

// Four ranks on two machines: how many share what is divided, and that none keeps gradients beside their float32 sums.
TEST_F(PlanTest, RanksHoldWhatTheirStrategyDivides) {
  StageConfig& stage = recipe_.stages[0];
  recipe_.device = "cuda";
  stage.dtype = "bfloat16";
  const StagePlan alone = plan_recipe(recipe_).front();
  struct Case {
    const char *strategy, *within;
    int64_t sharers;
  };
  for (const Case& c : {Case{"ddp", "world", 1}, {"zero1", "world", 4}, {"zero1", "node", 2}, {"zero2", "node", 2}}) {
    recipe_.distributed.strategy = c.strategy;
    recipe_.distributed.shard_within = c.within;
    const MemoryPlan memory = plan_stage(recipe_, stage, 20000, 4, 2).memory;
    EXPECT_EQ(memory.states, alone.memory.states / c.sharers) << c.strategy << c.within;
    EXPECT_EQ(memory.masters, alone.memory.masters / c.sharers) << c.strategy << c.within;
    const int64_t sums = 4 * alone.num_trainable / (c.strategy == std::string("zero2") ? c.sharers : 1);
    EXPECT_GE(memory.gradients, sums) << c.strategy << c.within;
    EXPECT_LT(memory.gradients, sums + 2 * alone.num_trainable) << c.strategy << c.within;
    const ScalingPoint point = scale(recipe_, stage, {.gpu = find_gpu("h100"), .num_nodes = 2, .gpus_per_node = 2});
    EXPECT_EQ(point.memory_bytes, static_cast<double>(memory.total())) << c.strategy << c.within;
  }
}

TEST_F(PlanTest, WhatACheckpointIsWrittenFromCounts) {
  StageConfig& stage = recipe_.stages[0];
  stage.dtype = "bfloat16";
  stage.max_steps = 10;
  const auto workspace = [&](int64_t save_steps, bool in_background) {
    stage.save_steps = save_steps;
    stage.async_save = in_background;
    return plan_recipe(recipe_).front().memory.workspace;
  };
  const int64_t none = workspace(0, true);
  EXPECT_EQ(workspace(10, true), none);  // after the last step comes the final model
  EXPECT_EQ(workspace(5, false), none);  // a step of this model takes more than its masters
  const StagePlan plan = plan_recipe(recipe_).front();
  EXPECT_EQ(workspace(5, true) - none, 4 * plan.num_trainable + plan.memory.states);
}

TEST_F(PlanTest, RecomputingKeepsLess) {
  const StagePlan plan = plan_recipe(recipe_).front();
  EXPECT_LT(plan.least_memory.activations, plan.memory.activations);
  recipe_.stages[0].gradient_checkpointing = true;
  const StagePlan recomputing = plan_recipe(recipe_).front();
  EXPECT_EQ(recomputing.memory.total() - recomputing.memory.program - recomputing.memory.packed,
            plan.least_memory.total() - plan.least_memory.program);
  EXPECT_GT(recomputing.flops_per_step, plan.flops_per_step);
}

// On a GPU alone: what blocks that recompute keep may wait in host memory, the last thing that a budget chooses.
TEST_F(PlanTest, OnAGpuABudgetMovesInputsOfBlocksToTheHost) {
  StageConfig& stage = recipe_.stages[0];
  recipe_.device = "cuda";
  stage.gradient_checkpointing = true;
  const StagePlan plain = plan_recipe(recipe_).front();
  EXPECT_EQ(plain.num_offloaded_inputs(), 0);
  ASSERT_LT(plain.least_memory.total(), plain.memory.total());
  stage.memory.offload_activations = true;
  const StagePlan all = plan_recipe(recipe_).front();
  EXPECT_EQ(all.num_offloaded_inputs(), plain.num_blocks - 1);
  EXPECT_EQ(all.memory.total(), plain.least_memory.total());
  EXPECT_EQ(all.flops_per_step, plain.flops_per_step);
  stage.memory.offload_activations = stage.gradient_checkpointing = false;
  stage.memory.budget_gb = static_cast<double>(plain.memory.total() - 1) / 1e9;
  const StagePlan budget = plan_recipe(recipe_).front();
  EXPECT_LE(static_cast<double>(budget.memory.total()), stage.memory.budget_gb * 1e9);
  EXPECT_EQ(budget.num_recomputed_blocks(), budget.num_blocks);
  EXPECT_EQ(budget.num_offloaded_inputs(), 1);
  EXPECT_EQ(what_recomputes(budget), fmt::format("{0} of {0} blocks recompute their MLP, {0} of them the rest as well, the "
                                                 "inputs of 1 wait in host memory",
                                                 budget.num_blocks));
  recipe_.device = "cpu";
  stage.memory = {.offload_activations = true};
  stage.gradient_checkpointing = true;
  EXPECT_EQ(plan_recipe(recipe_).front().num_offloaded_inputs(), 0);
}

TEST_F(PlanTest, LowRankAdaptersNeedNoStatesForTheWeights) {
  const StagePlan whole = plan_recipe(recipe_).front();
  recipe_.stages[0].lora.emplace().lora_r = 4;
  const StagePlan lora = plan_recipe(recipe_).front();
  EXPECT_LT(lora.memory.states, whole.memory.states);
  EXPECT_GT(lora.num_parameters, whole.num_parameters);
}

TEST_F(PlanTest, AProfileNamesTheOperationsAndWritesATrace) {
  const fs::path trace = folder_.path() / "trace.json";
  Counter counter;
  Profiler profiler;
  run_recipe(recipe_, {}, counter, [] { return 0; });
  const Profile profile = profiler.stop(trace);
  const auto row =
      std::find_if(profile.operations.begin(), profile.operations.end(),
                   [](const ProfileRow& each) { return each.name == "caldera::matrix_product"; });
  ASSERT_NE(row, profile.operations.end());
  EXPECT_GT(row->count, 0);
  EXPECT_LE(row->self_ms, row->total_ms);
  double all_ms = 0;
  for (const ProfileRow& each : profile.operations) all_ms += each.self_ms;
  EXPECT_GT(all_ms, 0);
  EXPECT_THAT(profile_table(profile, counter.start.num_steps), testing::HasSubstr("self ms/step"));
  EXPECT_TRUE(read_json(trace).contains("traceEvents"));
}

}  // namespace
}  // namespace caldera
