// One declaration per option. A configuration is a plain struct with defaults; `fields(visitor, config)` names each member
// once, and parsing, checking, help, the dump, docs/recipe.md and overrides all come from that.
//
//   template <class V> void fields(V& v, OptimizerConfig& c) {
//     v("learning_rate", c.learning_rate, "peak learning rate", range(0.0, 1.0));
//     v("lr_scheduler_type", c.lr_scheduler_type, "...", one_of({"cosine", "linear", "constant"}));
//     v("optimizer", c.optimizer, "a nested block");          // any struct that has fields() itself
//     v("stages", c.stages, "a list of blocks", required());
//   }
// Members: bool, int64_t, double, std::string, std::filesystem::path (relative to the working directory),
// std::vector<std::string>, nested structs, std::vector<struct>, std::optional of these.
#pragma once
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace caldera {

struct FieldRule {
  double min = -std::numeric_limits<double>::infinity(), max = std::numeric_limits<double>::infinity();
  bool open_min = false;  // min itself is not allowed
  std::vector<std::string> choices;
  bool is_required = false;
};
inline FieldRule any() { return {}; }
inline FieldRule range(double min, double max) { return {.min = min, .max = max}; }
inline FieldRule at_least(double min) { return {.min = min}; }
inline FieldRule above(double min) { return {.min = min, .open_min = true}; }
inline FieldRule one_of(std::vector<std::string> choices) { return {.choices = std::move(choices)}; }
inline FieldRule required() { return {.is_required = true}; }

}  // namespace caldera
