// Which settings of a stage may change when it goes on.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "train/recipe.h"

namespace caldera {

// Where a stage goes on.
struct ResumePoint {
  int64_t step = 0;         // steps done
  int64_t num_samples = 0;  // of its data
  bool may_extend = false;  // --extend: another number of steps, whatever that does to the learning rate
};

// Compares recipe_part() of a stage as it was begun, `before`, which stands in `where`, with the recipe. Free
// are what does not touch the numbers (saving, memory, threads), max_tokens_per_micro_batch under token_mean,
// and the number of steps where the rates of those to come stay the same, as under `constant`. Settings that
// an older version did not know count as their defaults. `at`: none where the stage is finished. Returns what
// is to be said of an extension: how the rate jumps; else "". Throws ConfigError naming the first setting
// that differs, and what to do.
std::string check_same_recipe(const std::filesystem::path& where, const std::string& before,
                              const Recipe& recipe, const StageConfig& stage,
                              const std::optional<ResumePoint>& at);

}  // namespace caldera
