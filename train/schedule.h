// Learning rate schedules, as transformers' get_scheduler.
#pragma once
#include <cstdint>
#include <string>

#include "train/recipe.h"

namespace caldera {

// Steps over which the rate rises: warmup_steps where it is given, else ceil(warmup_ratio * num_steps), as
// HF's TrainingArguments have it; none under "constant".
int64_t num_warmup_steps(const OptimizerConfig& optimizer, int64_t num_steps);

// Factor of the peak learning rate for optimizer step `step` (from 0) of `num_steps`. Warm-up is linear and
// begins at 0; then "cosine" falls to 0 over half a period, "cosine_with_min_lr" to its share of the peak,
// "linear" in a straight line to 0, and "constant_with_warmup" stays. "constant" is 1 from the first step on.
double lr_factor(const OptimizerConfig& optimizer, int64_t step, int64_t num_steps);

// What is to be said of a stage in which nothing learns, as its only step has learning rate 0; else "".
std::string schedule_warning(const std::string& stage, const OptimizerConfig& optimizer, int64_t num_steps);

}  // namespace caldera
