#include "train/schedule.h"

#include <gtest/gtest.h>

namespace caldera {

// Numbers of transformers 5.17: get_scheduler("cosine", ..., num_warmup_steps=3, num_training_steps=10) and "linear".
TEST(Schedule, EqualsTransformers) {
  const std::vector<double> cosine = {0.0, 1.0 / 3, 2.0 / 3, 1.0, 0.9504844339512095, 0.8117449009293668,
                                      0.6112604669781572, 0.3887395330218429, 0.18825509907063326, 0.04951556604879048};
  for (int64_t step = 0; step < 10; ++step)
    EXPECT_NEAR(lr_factor("cosine", 0.3, step, 10), cosine[static_cast<size_t>(step)], 1e-12) << step;
  EXPECT_NEAR(lr_factor("linear", 0.3, 8, 10), 2.0 / 7, 1e-12);
  EXPECT_EQ(lr_factor("constant", 0.3, 9, 10), 1.0);
}

TEST(Schedule, WarmUpRoundsUpAsTransformersDoes) {
  // ceil(0.03 * 20) = 1 step of warm-up: the first step has learning rate 0.
  EXPECT_EQ(lr_factor("cosine", 0.03, 0, 20), 0.0);
  EXPECT_EQ(lr_factor("cosine", 0.03, 1, 20), 1.0);
  EXPECT_EQ(lr_factor("cosine", 0.0, 0, 20), 1.0);
}

}  // namespace caldera
