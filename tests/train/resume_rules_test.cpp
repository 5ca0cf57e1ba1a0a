#include "train/resume_rules.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/strings.h"
#include "tests/train/tiny_run.h"
#include "train/stage.h"

namespace caldera {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// A stage of six steps, as it was begun.
Recipe begun(const std::string& lr_scheduler_type) {
  Recipe recipe;
  recipe.model.vision_tower = "v";
  recipe.model.language_model = "l";
  recipe.output = "o";
  StageConfig stage;
  stage.name = "finetune";
  stage.trainable = {"projector"};
  stage.data.data_path = "d";
  stage.data.conversation_template = "v1";
  stage.optimizer.lr_scheduler_type = lr_scheduler_type;
  stage.optimizer.warmup_ratio = 0;
  stage.max_steps = 6;
  recipe.stages = {stage};
  return recipe;
}

// What is said where a stage that was begun under one recipe goes on under another, or the error.
std::string said(const Recipe& before, const Recipe& now,
                 const std::optional<ResumePoint>& at = ResumePoint{4, 100, false}) {
  try {
    return check_same_recipe("step-4", recipe_part(before, before.stages[0]), now, now.stages[0], at);
  } catch (const ConfigError& error) {
    return std::string("refused: ") + error.what();
  }
}

}  // namespace

TEST(ResumeRules, AChangedListIsNamedAsAWhole) {
  const Recipe before = begun("cosine");
  Recipe now = before;
  now.stages[0].trainable = {"projector", "language_model"};
  EXPECT_THAT(said(before, now), HasSubstr("\"trainable: [projector]\", the recipe now says \"trainable: [projector, language_model]\""));
}

TEST(ResumeRules, WhatDoesNotTouchTheNumbersMayChange) {
  const Recipe before = begun("cosine");
  Recipe now = before;
  EXPECT_EQ(said(before, now), "");
  StageConfig& stage = now.stages[0];
  stage.save_steps = 7;
  stage.save_best = true;
  stage.async_save = true;
  stage.eval_steps = 7;
  stage.gradient_checkpointing = true;
  stage.memory = {.budget_gb = 3, .offload_optimizer = true, .offload_activations = true};
  stage.data.dataloader_num_workers = 5;
  stage.data.eval_data_path = "e";
  stage.data.image_roots = {"roots/a", "roots/b"};
  now.model.random_parts = {"language_model"};
  now.output = "elsewhere";
  now.distributed.strategy = "zero2";
  EXPECT_EQ(said(before, now), "");
  EXPECT_EQ(said(before, now, std::nullopt), "");
  stage.optimizer.mm_projector_lr = 1e-4;
  EXPECT_EQ(said(before, now),
            "refused: step-4: stage finetune was begun with \"mm_projector_lr: none\", the recipe now says "
            "\"mm_projector_lr: 0.0001\"; set it back, or start anew with --resume never");
}

TEST(ResumeRules, MicroBatchesMayChangeWhereTheLossDoesNotDependOnThem) {
  Recipe before = begun("cosine"), now = before;
  now.stages[0].max_tokens_per_micro_batch = 512;
  EXPECT_EQ(said(before, now), "");
  before.stages[0].loss = now.stages[0].loss = "micro_batch_mean";
  EXPECT_THAT(said(before, now),
              AllOf(HasSubstr("\"max_tokens_per_micro_batch: 8192\""),
                    HasSubstr("\"max_tokens_per_micro_batch: 512\"; loss: micro_batch_mean depends on it")));
}

TEST(ResumeRules, TheNumberOfStepsIsFreeUnderAConstantRate) {
  for (const char* type : {"constant", "constant_with_warmup"}) {
    const Recipe before = begun(type);
    Recipe now = before;
    for (const int64_t steps : {4, 5, 60}) {
      now.stages[0].max_steps = steps;
      EXPECT_EQ(said(before, now), "") << type << " " << steps;
    }
    now.stages[0].max_steps = 0;
    now.stages[0].num_train_epochs = 9;  // of one step: 100 samples, 128 a step
    EXPECT_EQ(said(before, now), "");
    now.stages[0].num_train_epochs = 3;
    EXPECT_THAT(said(before, now),
                HasSubstr("stage finetune has done 4 of 6 steps, the recipe now gives it 3"));
  }
  // A warm-up by share that is not over grows with the number of steps.
  Recipe before = begun("constant_with_warmup"), now = before;
  before.stages[0].optimizer.warmup_ratio = now.stages[0].optimizer.warmup_ratio = 0.5;
  now.stages[0].max_steps = 12;
  EXPECT_THAT(said(before, now), HasSubstr("--extend"));
  now.stages[0].max_steps = 8;  // it ends where the stage stands
  EXPECT_EQ(said(before, now), "");
}

TEST(ResumeRules, OtherwiseItTakesExtendWhichTellsOfTheJump) {
  const Recipe before = begun("cosine");
  Recipe now = before;
  now.stages[0].max_steps = 12;
  EXPECT_EQ(said(before, now),
            "refused: step-4: stage finetune would have 12 steps in place of 6: at step 5 the learning rate "
            "jumps from "
            "0.00025 to 0.00075, as lr_scheduler_type cosine goes by their number: set max_steps and "
            "num_train_epochs back, "
            "or go on all the same with --extend");
  EXPECT_EQ(
      said(before, now, ResumePoint{4, 100, true}),
      "stage finetune has 12 steps in place of 6: at step 5 the learning rate jumps from 0.00025 to 0.00075");
  // Epochs do not count beside max_steps.
  now.stages[0].max_steps = 6;
  now.stages[0].num_train_epochs = 3;
  EXPECT_EQ(said(before, now), "");
}

TEST(ResumeRules, AFinishedStageIsNotExtendedUnasked) {
  const Recipe before = begun("constant");
  Recipe now = before;
  now.stages[0].max_steps = 12;
  EXPECT_THAT(said(before, now, std::nullopt), HasSubstr("move its final/ aside"));
}

TEST(ResumeRules, SettingsThatAnOlderVersionDidNotKnowAreTheirDefaults) {
  const Recipe now = begun("cosine");
  std::string older = recipe_part(now, now.stages[0]);
  for (const char* line : {"    adam_beta2: 0.999\n", "  float8: false\n"}) {
    ASSERT_NE(older.find(line), std::string::npos) << older;
    older = replace_all(older, line, "");
  }
  older = replace_all(older, "  eval_steps: 0\n", "  eval_steps: 0\n  logging_steps: 1\n");
  EXPECT_EQ(check_same_recipe("step-4", older, now, now.stages[0], std::nullopt), "");
  older = replace_all(older, "  eval_steps: 0\n", "  gone: 0\n");
  EXPECT_THAT(
      [&] { check_same_recipe("step-4", older, now, now.stages[0], std::nullopt); },
      testing::ThrowsMessage<ConfigError>(AllOf(
          HasSubstr("step-4: the stage was begun under a recipe that this version of caldera does not take"),
          HasSubstr("--resume never"), HasSubstr("gone: unknown key"))));
}

class ExtendedRunTest : public TinyRunTest {
 protected:
  // Stopped after two of six steps.
  Recipe stopped(const std::string& output, const std::string& lr_scheduler_type) {
    Recipe recipe = six_step_recipe(folder_.path(), output);
    recipe.stages[0].optimizer.lr_scheduler_type = lr_scheduler_type;
    recipe.stages[0].optimizer.warmup_ratio = 0;
    int steps = 0;
    train(recipe, [&] { return ++steps == 2; });
    return recipe;
  }
};

TEST_F(ExtendedRunTest, GoesOnAsIfItHadBeenThatLongFromTheStart) {
  Recipe run = stopped("a", "constant");
  run.stages[0].max_steps = 9;
  EXPECT_EQ(train(run).size(), 7u);
  Recipe straight = run;
  straight.output += "-straight";
  EXPECT_EQ(train(straight).size(), 9u);
  EXPECT_EQ(final_weights(run), final_weights(straight));
}

TEST_F(ExtendedRunTest, UnderACosineOnlyWhenAsked) {
  Recipe run = stopped("a", "cosine");
  run.stages[0].max_steps = 9;
  EXPECT_THAT([&] { train(run); },
              testing::ThrowsMessage<ConfigError>(HasSubstr("go on all the same with --extend")));
  Recorder recorder;
  run_recipe(run, {.extend = true}, recorder, [] { return 0; });
  EXPECT_EQ(recorder.losses.size(), 7u);
}

}  // namespace caldera
