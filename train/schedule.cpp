#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace caldera {

double lr_factor(const std::string& lr_scheduler_type, double warmup_ratio, int64_t step, int64_t num_steps) {
  const auto num_warmup = static_cast<int64_t>(std::ceil(warmup_ratio * static_cast<double>(num_steps)));
  if (step < num_warmup) return static_cast<double>(step) / static_cast<double>(std::max<int64_t>(1, num_warmup));
  const double progress = static_cast<double>(step - num_warmup) /
                          static_cast<double>(std::max<int64_t>(1, num_steps - num_warmup));
  if (lr_scheduler_type == "cosine") return std::max(0.0, 0.5 * (1 + std::cos(std::numbers::pi * progress)));
  if (lr_scheduler_type == "linear") return std::max(0.0, 1 - progress);
  CALDERA_ASSERT(lr_scheduler_type == "constant");
  return 1;
}

}  // namespace caldera
