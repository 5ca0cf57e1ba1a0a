// Properties of the whole loop, on a tiny model and pictures.
#include "train/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/weights/safetensors.h"
#include "tests/train/tiny_run.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

class TrainerTest : public testing::Test {
 protected:
  void SetUp() override { write_tiny_run(folder_.path()); }

  Recipe recipe(const std::string& output) const { return six_step_recipe(folder_.path(), output); }

  std::vector<double> train(
      const Recipe& recipe, const std::string& resume = "auto",
      const std::function<bool()>& stop = [] { return false; }) {
    Recorder recorder;
    outcome_ = run_recipe(recipe, {.resume = resume}, recorder, stop);
    return recorder.losses;
  }

  TemporaryFolder folder_;
  Outcome outcome_ = Outcome::kFinished;
};

TEST_F(TrainerTest, LearnsAndTheSameSeedGivesTheSameBits) {
  const std::vector<double> losses = train(recipe("a"));
  EXPECT_LT(losses.back(), 0.8 * losses.front());
  EXPECT_EQ(losses, train(recipe("b")));
  EXPECT_EQ(final_weights(recipe("a")), final_weights(recipe("b")));
  Recipe other = recipe("c");
  other.seed = 1;
  EXPECT_NE(losses, train(other));
}

TEST_F(TrainerTest, HowAStepIsPackedChangesNothingButRounding) {
  const std::vector<double> one_row = train(recipe("a"));
  Recipe rows = recipe("b");
  rows.stages[0].max_tokens_per_micro_batch = 1;  // each sample by itself
  const std::vector<double> four_rows = train(rows);
  for (size_t i = 0; i < one_row.size(); ++i) EXPECT_NEAR(four_rows[i], one_row[i], 1e-5 * one_row[i]) << i;
}

TEST_F(TrainerTest, MicroBatchMeanWeighsRowsAlikeAsLlavaDoes) {
  Recipe rows = recipe("a");
  rows.stages[0].max_tokens_per_micro_batch = 1;
  rows.stages[0].max_steps = 1;
  const double token_mean = train(rows)[0];
  rows.output = recipe("b").output;
  rows.stages[0].loss = "micro_batch_mean";
  EXPECT_NE(token_mean, train(rows)[0]);  // answers of different lengths
}

TEST_F(TrainerTest, GradientCheckpointingChangesNoBit) {
  Recipe recomputed = recipe("b");
  recomputed.stages[0].gradient_checkpointing = true;
  EXPECT_EQ(train(recipe("a")), train(recomputed));
  EXPECT_EQ(final_weights(recipe("a")), final_weights(recomputed));
}

TEST_F(TrainerTest, StoppedAfterAnyStepItGoesOnBitForBit) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    Recipe straight = recipe(std::string("straight_") + dtype);
    straight.stages[0].dtype = dtype;
    straight.stages[0].global_batch_size = 3;  // steps of 3 and 1 samples: epochs end inside the run
    const std::vector<double> expected = train(straight);
    for (int at = 1; at < 6; ++at) {
      Recipe stopped = straight;
      stopped.output = recipe(fmt::format("stopped_{}_{}", dtype, at)).output;
      int steps = 0;
      std::vector<double> losses = train(stopped, "auto", [&] { return ++steps == at; });
      EXPECT_EQ(outcome_, Outcome::kStopped);
      const std::vector<double> rest = train(stopped);
      losses.insert(losses.end(), rest.begin(), rest.end());
      EXPECT_EQ(losses, expected) << at;
      EXPECT_EQ(final_weights(stopped), final_weights(straight)) << at;
    }
  }
}

TEST_F(TrainerTest, OnlyWhatTrainsChanges) {
  Recipe projector = recipe("a");
  projector.stages[0].trainable = {"projector"};
  projector.stages[0].optimizer.warmup_ratio = 0;
  train(projector);
  const auto before = build_llava(build_spec_of(projector, 0));
  const auto after = open_weights_folder(fs::path(projector.output) / "finetune" / "final");
  for (const NamedTensor& tensor : before->tensors()) {
    const at::Tensor now = after->read(tensor.name);
    const bool trains = tensor.name.starts_with("multi_modal_projector");
    EXPECT_EQ(at::equal(now.narrow(0, 0, tensor.value().size(0)), tensor.value()), !trains) << tensor.name;
  }
}

TEST_F(TrainerTest, ASecondStageStartsFromWhatTheFirstTrained) {
  Recipe two = recipe("a");
  two.stages.insert(two.stages.begin(), two.stages[0]);
  two.stages[0].name = "pretrain";
  two.stages[0].trainable = {"projector"};
  train(two);
  const auto first = open_weights_folder(fs::path(two.output) / "pretrain" / "final");
  const auto start = build_llava(build_spec_of(two, 1));
  for (const NamedTensor& tensor : start->component_tensors("projector"))
    EXPECT_TRUE(at::equal(tensor.value(), first->read(tensor.name))) << tensor.name;
}

TEST_F(TrainerTest, ANonFiniteLossStopsWithTheSamplesNamed) {
  Recipe wild = recipe("a");
  const fs::path weights = folder_.path() / "parts" / "language" / "model.safetensors";
  const auto model = build_llava(build_spec_of(wild, 0));
  TensorList tensors;
  for (const NamedTensor& tensor : model->language->tensors())
    tensors.emplace_back(tensor.name, tensor.value().clone());
  for (auto& [name, value] : tensors)
    if (name == "model.norm.weight") value[0] = std::numeric_limits<float>::quiet_NaN();
  write_safetensors(weights, tensors);
  EXPECT_THAT([&] { train(wild); }, ThrowsMessage<Error>(HasSubstr("step 1: loss nan")));
  EXPECT_THAT([&] { train(wild); }, ThrowsMessage<Error>(HasSubstr("q0")));
  EXPECT_FALSE(fs::exists(fs::path(wild.output) / "finetune" / "final"));
}

TEST_F(TrainerTest, AChangedRecipeIsNotResumed) {
  Recipe changed = recipe("a");
  int steps = 0;
  train(changed, "auto", [&] { return ++steps == 2; });
  changed.stages[0].optimizer.learning_rate = 5e-3;
  EXPECT_THAT([&] { train(changed); },
              ThrowsMessage<ConfigError>(HasSubstr("the recipe now says \"learning_rate: 0.005\"")));
  changed.stages[0].save_steps = 1;  // touches nothing that is computed
  changed.stages[0].optimizer.learning_rate = 1e-2;
  EXPECT_EQ(train(changed).size(), 4u);
}

TEST_F(TrainerTest, StartingAnewMovesWhatIsThereAside) {
  train(recipe("a"));
  EXPECT_EQ(train(recipe("a")).size(), 0u);  // finished
  EXPECT_EQ(train(recipe("a"), "never").size(), 6u);
  EXPECT_TRUE(fs::exists(fs::path(recipe("a").output) / "finetune.old-1" / "final"));
}

TEST_F(TrainerTest, WhatCanBeKnownBeforeIsSaidBeforeTheFirstStep) {
  Recipe two = recipe("a");
  two.stages.push_back(two.stages[0]);
  two.stages[1].name = "second";
  fs::remove(folder_.path() / "images" / "red.png");
  EXPECT_THAT([&] { train(two); }, ThrowsMessage<DataError>(HasSubstr("red.png")));
  EXPECT_FALSE(fs::exists(fs::path(two.output) / "finetune" / "metrics.jsonl"));
}

}  // namespace
}  // namespace caldera
