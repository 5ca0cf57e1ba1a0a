#include "train/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "base/error.h"

namespace caldera {

int64_t num_warmup_steps(const OptimizerConfig& optimizer, int64_t num_steps) {
  if (optimizer.lr_scheduler_type == "constant") return 0;
  if (optimizer.warmup_steps) return *optimizer.warmup_steps;
  return static_cast<int64_t>(std::ceil(optimizer.warmup_ratio * static_cast<double>(num_steps)));
}

double lr_factor(const OptimizerConfig& optimizer, int64_t step, int64_t num_steps) {
  const std::string& type = optimizer.lr_scheduler_type;
  const int64_t num_warmup = num_warmup_steps(optimizer, num_steps);
  if (step < num_warmup) return static_cast<double>(step) / static_cast<double>(num_warmup);
  const double progress = static_cast<double>(step - num_warmup) /
                          static_cast<double>(std::max<int64_t>(1, num_steps - num_warmup));
  const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * progress));
  if (type == "cosine") return std::max(0.0, cosine);
  if (type == "cosine_with_min_lr") {
    // Every group has the same factor, so that min_lr is a share of learning_rate, the optimizer's own.
    const double peak = std::max(optimizer.learning_rate, std::numeric_limits<double>::min());  // it may be 0
    const double least = optimizer.min_lr_rate.value_or(optimizer.min_lr.value_or(0) / peak);
    return std::max(0.0, cosine * (1 - least) + least);
  }
  if (type == "linear") return std::max(0.0, 1 - progress);
  CALDERA_ASSERT(type == "constant" || type == "constant_with_warmup");
  return 1;
}

std::string schedule_warning(const std::string& stage, const OptimizerConfig& optimizer, int64_t num_steps) {
  if (num_steps != 1 || lr_factor(optimizer, 0, num_steps) > 0) return "";
  return fmt::format(
      "stage {} learns nothing: warm-up begins at learning rate 0, and that is the rate of its only step; "
      "give it more "
      "steps (max_steps, num_train_epochs), or set stages.{}.optimizer.lr_scheduler_type: constant",
      stage, stage);
}

}  // namespace caldera
