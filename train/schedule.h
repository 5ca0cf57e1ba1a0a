// Learning rate schedules, as transformers' get_scheduler.
#pragma once
#include <cstdint>
#include <string>

namespace caldera {

// Factor of the peak learning rate for optimizer step `step` (from 0) of `num_steps`. Warm-up is linear over
// ceil(warmup_ratio * num_steps) steps and begins at 0, as HF's does; then "cosine" falls to 0 over half a period, "linear" in a
// straight line, and "constant" stays.
double lr_factor(const std::string& lr_scheduler_type, double warmup_ratio, int64_t step, int64_t num_steps);

}  // namespace caldera
