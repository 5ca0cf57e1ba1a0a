#include "train/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace caldera {
namespace {

using testing::HasSubstr;

// A course with three steps of warm-up, unless told otherwise.
OptimizerConfig course(const std::string& type, double warmup_ratio = 0.3) {
  OptimizerConfig optimizer;
  optimizer.learning_rate = 1e-3;
  optimizer.lr_scheduler_type = type;
  optimizer.warmup_ratio = warmup_ratio;
  return optimizer;
}

void expect_course(const OptimizerConfig& optimizer, const std::vector<double>& expected) {
  const auto num_steps = static_cast<int64_t>(expected.size());
  for (int64_t step = 0; step < num_steps; ++step)
    EXPECT_NEAR(lr_factor(optimizer, step, num_steps), expected[static_cast<size_t>(step)], 1e-12)
        << optimizer.lr_scheduler_type << " " << step;
}

}  // namespace

// Numbers of transformers 5.17: get_scheduler(NAME, ..., num_warmup_steps=3, num_training_steps=10).
TEST(Schedule, EqualsTransformers) {
  expect_course(course("cosine"),
                {0.0, 1.0 / 3, 2.0 / 3, 1.0, 0.9504844339512095, 0.8117449009293668, 0.6112604669781572,
                 0.3887395330218429, 0.18825509907063326, 0.04951556604879048});
  expect_course(course("linear"),
                {0, 1.0 / 3, 2.0 / 3, 1, 6.0 / 7, 5.0 / 7, 4.0 / 7, 3.0 / 7, 2.0 / 7, 1.0 / 7});
  expect_course(course("constant"), {1, 1, 1, 1, 1, 1, 1, 1, 1, 1});
  expect_course(course("constant_with_warmup"), {0, 1.0 / 3, 2.0 / 3, 1, 1, 1, 1, 1, 1, 1});
  // scheduler_specific_kwargs {"min_lr": 1e-4} at learning rate 1e-3, and {"min_lr_rate": 0.1}: the same.
  OptimizerConfig by_rate = course("cosine_with_min_lr"), by_share = by_rate;
  by_rate.min_lr = 1e-4;
  by_share.min_lr_rate = 0.1;
  for (const OptimizerConfig& optimizer : {by_rate, by_share})
    expect_course(optimizer,
                  {0.0, 1.0 / 3, 2.0 / 3, 1.0, 0.9554359905560885, 0.8305704108364301, 0.6501344202803414,
                   0.44986557971965857, 0.26942958916356996, 0.14456400944391146});
}

TEST(Schedule, WarmUpRoundsUpAsTransformersDoes) {
  // ceil(0.03 * 20) = 1 step of warm-up: the first step has learning rate 0.
  EXPECT_EQ(lr_factor(course("cosine", 0.03), 0, 20), 0.0);
  EXPECT_EQ(lr_factor(course("cosine", 0.03), 1, 20), 1.0);
  EXPECT_EQ(lr_factor(course("cosine", 0.0), 0, 20), 1.0);
}

TEST(Schedule, StepsOfWarmUpGoBeforeTheirShare) {
  OptimizerConfig optimizer = course("linear", 0.5);
  optimizer.warmup_steps = 2;
  expect_course(optimizer, {0, 0.5, 1, 7.0 / 8, 6.0 / 8, 5.0 / 8, 4.0 / 8, 3.0 / 8, 2.0 / 8, 1.0 / 8});
  optimizer.warmup_steps = 100;  // more than there are: the peak is never reached
  EXPECT_EQ(lr_factor(optimizer, 9, 10), 0.09);
}

TEST(Schedule, AFrozenRateOfZeroStaysANumber) {
  OptimizerConfig optimizer = course("cosine_with_min_lr");
  optimizer.learning_rate = 0;
  optimizer.min_lr = 0;
  EXPECT_TRUE(std::isfinite(lr_factor(optimizer, 9, 10)));
}

TEST(Schedule, AStageThatLearnsNothingIsToldOf) {
  EXPECT_THAT(
      schedule_warning("pretrain", course("cosine", 0.03), 1),
      HasSubstr(
          "stage pretrain learns nothing: warm-up begins at learning rate 0, and that is the rate of its "
          "only step; give it more steps (max_steps, num_train_epochs), or set "
          "stages.pretrain.optimizer.lr_scheduler_type: constant"));
  EXPECT_EQ(schedule_warning("pretrain", course("cosine", 0.03), 2), "");
  EXPECT_EQ(schedule_warning("pretrain", course("constant", 0.03), 1), "");
  EXPECT_EQ(schedule_warning("pretrain", course("cosine", 0), 1), "");
}

}  // namespace caldera
