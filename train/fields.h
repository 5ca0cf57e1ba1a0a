// One declaration per option. A configuration is a plain struct with defaults; `fields(visitor, config)`
// names each member once, and parsing, checking, the dump, docs/recipe.md and overrides all come from that
// (see yaml_fields.h).
//
//   template <class V> void fields(V& v, OptimizerConfig& c) {
//     v("learning_rate", c.learning_rate, "peak learning rate", range(0.0, 1.0));
//     v("lr_scheduler_type", c.lr_scheduler_type, "...", one_of({"cosine", "linear"}));
//     v("optimizer", c.optimizer, "a nested block");          // any struct that has fields() itself
//     v("stages", c.stages, "a list of blocks", required());
//   }
// Members: bool, int64_t, uint64_t, double, std::string, std::vector<std::string>, nested structs,
// std::vector<struct>, std::optional of these.
#pragma once
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace caldera {

struct FieldRule {
  double min = -std::numeric_limits<double>::infinity(), max = std::numeric_limits<double>::infinity();
  bool open_min = false, open_max = false;  // min or max itself is not allowed
  std::vector<std::string> choices;         // of a text, or of each text in a list
  bool is_required = false;                 // must be there, and neither "" nor []
  bool is_path = false;                     // a leading ~ and each ${NAME} are expanded
};
inline FieldRule any() { return {}; }
inline FieldRule range(double min, double max) { return {.min = min, .max = max}; }
inline FieldRule range_below(double min, double max) {
  return {.min = min, .max = max, .open_max = true};
}  // [min, max)
inline FieldRule at_least(double min) { return {.min = min}; }
inline FieldRule above(double min) { return {.min = min, .open_min = true}; }
inline FieldRule one_of(std::vector<std::string> choices) { return {.choices = std::move(choices)}; }
inline FieldRule file_or_folder() { return {.is_path = true}; }
inline FieldRule required(FieldRule rule = {}) {
  rule.is_required = true;
  return rule;
}

}  // namespace caldera
