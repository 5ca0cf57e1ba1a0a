#include "train/resume_rules.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <set>
#include <string_view>

#include "base/error.h"
#include "base/files.h"
#include "base/strings.h"
#include "train/schedule.h"
#include "train/stage.h"
#include "train/yaml_tree.h"

namespace caldera {
namespace {

// They do not touch what is computed.
constexpr std::array kFreeKeys = {"save_steps",
                                  "save_total_limit",
                                  "save_best",
                                  "eval_steps",
                                  "async_save",
                                  "budget_gb",
                                  "offload_optimizer",
                                  "gradient_checkpointing",
                                  "offload_activations",
                                  "eval_data_path",
                                  "dataloader_num_workers",
                                  "random_parts",
                                  "image_roots"};

// Each setting's value by its path.
using PartSettings = std::map<std::string, std::string>;
void list_settings(const YamlNode& node, const std::string& path, PartSettings& settings) {
  const bool is_list_of_texts =
      node.kind == YamlNode::Kind::kList &&
      std::all_of(node.items.begin(), node.items.end(),
                  [](const YamlNode& item) { return item.kind == YamlNode::Kind::kScalar; });
  if (is_list_of_texts) {
    std::vector<std::string> texts;
    for (const YamlNode& item : node.items) texts.push_back(item.text);
    if (!texts.empty()) settings[path] = fmt::format("[{}]", fmt::join(texts, ", "));
    return;
  }
  for (size_t i = 0; i < node.items.size(); ++i) {
    const std::string name = node.kind == YamlNode::Kind::kMap ? node.keys[i] : std::to_string(i);
    list_settings(node.items[i], path.empty() ? name : path + "." + name, settings);
  }
  if (node.kind == YamlNode::Kind::kScalar) settings[path] = node.text;
}
PartSettings settings_of(const std::string& yaml) {
  Faults faults;
  PartSettings settings;
  list_settings(parse_yaml(yaml, "the recipe", faults), "", settings);
  return settings;
}

// A stage's part of a recipe, as an older version may have written it.
Recipe read_part(const fs::path& where, const std::string& yaml) {
  std::vector<std::string> lines = split(yaml, "\n");
  std::erase_if(lines, [](const std::string& line) { return strip(line).starts_with("logging_steps:"); });
  try {
    Recipe part = parse_recipe(join(lines, "\n"), "its recipe", {"output=."});  // a part has none
    part.output.clear();
    return part;
  } catch (const ConfigError& error) {
    throw ConfigError(
        fmt::format("{}: the stage was begun under a recipe that this version of caldera does not take; go "
                    "on with the version that "
                    "wrote it, or start anew with --resume never:\n{}",
                    where.string(), error.what()));
  }
}

// As the loader counts them.
int64_t num_steps_of(const StageConfig& stage, int64_t num_samples) {
  if (stage.max_steps > 0) return stage.max_steps;
  const int64_t an_epoch = (num_samples + stage.global_batch_size - 1) / stage.global_batch_size;
  return static_cast<int64_t>(std::ceil(stage.num_train_epochs * static_cast<double>(an_epoch)));
}

// Another number of steps: what is to be said of it.
std::string check_length(const fs::path& where, const StageConfig& before, const StageConfig& stage,
                         const ResumePoint& at) {
  const int64_t old_steps = num_steps_of(before, at.num_samples), steps = num_steps_of(stage, at.num_samples);
  CALDERA_CHECK(steps >= at.step, ConfigError,
                "{}: stage {} has done {} of {} steps, the recipe now gives it {}: give it more (max_steps, "
                "num_train_epochs), or go back to an earlier checkpoint (--resume FOLDER)",
                where.string(), stage.name, at.step, old_steps, steps);
  const auto rate = [&](int64_t step, int64_t of) {
    return stage.optimizer.learning_rate * lr_factor(stage.optimizer, step, of);
  };
  bool is_same = true;
  for (int64_t step = at.step; is_same && step < std::max(at.step + 1, std::min(old_steps, steps)); ++step)
    is_same = rate(step, old_steps) == rate(step, steps);
  if (is_same) return "";
  const std::string jump =
      fmt::format("{} steps in place of {}: at step {} the learning rate jumps from {:.4g} to {:.4g}", steps,
                  old_steps, at.step + 1, rate(at.step, old_steps), rate(at.step, steps));
  CALDERA_CHECK(at.may_extend, ConfigError,
                "{}: stage {} would have {}, as lr_scheduler_type {} goes by their number: set max_steps and "
                "num_train_epochs back, or go on all the same with --extend",
                where.string(), stage.name, jump, stage.optimizer.lr_scheduler_type);
  return fmt::format("stage {} has {}", stage.name, jump);
}

}  // namespace

std::string check_same_recipe(const fs::path& where, const std::string& before, const Recipe& recipe,
                              const StageConfig& stage, const std::optional<ResumePoint>& at) {
  const Recipe old = read_part(where, before);
  PartSettings old_settings = settings_of(dump_recipe(old)),
               settings = settings_of(recipe_part(recipe, stage));
  bool has_other_length = false;
  std::set<std::string> paths;
  for (const PartSettings& each : {old_settings, settings})
    for (const auto& [path, value] : each) paths.insert(path);
  for (const std::string& path : paths) {
    const auto text_in = [&](const PartSettings& all) {
      const auto found = all.find(path);
      return found == all.end() ? "none" : found->second;
    };
    const std::string old_value = text_in(old_settings), value = text_in(settings);
    const std::string key = path.substr(path.rfind('.') + 1);
    if (old_value == value || std::find(kFreeKeys.begin(), kFreeKeys.end(), key) != kFreeKeys.end()) continue;
    const bool is_packing = key == "max_tokens_per_micro_batch",
               is_length = key == "max_steps" || key == "num_train_epochs";
    if (is_packing && stage.loss == "token_mean") continue;
    if (is_length && at) {
      has_other_length = true;
      continue;
    }
    const char* hint = "set it back, or start anew with --resume never";
    if (is_packing)
      hint = "loss: micro_batch_mean depends on it: set it back, or start anew with --resume never";
    if (is_length)
      hint =
          "set it back; to train the finished stage further, move its final/ aside and give --extend: it then goes "
          "on from its newest checkpoint";
    throw ConfigError(
        fmt::format("{}: stage {} was begun with \"{}: {}\", the recipe now says \"{}: {}\"; {}",
                    where.string(), stage.name, key, old_value, key, value, hint));
  }
  return has_other_length ? check_length(where, old.stages.front(), stage, *at) : "";
}

}  // namespace caldera
