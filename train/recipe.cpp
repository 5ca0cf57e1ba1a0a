#include "train/recipe.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/files.h"
#include "data/template.h"
#include "model/projector/projector.h"
#include "train/recipe_fields.h"
#include "train/yaml_fields.h"
#include "train/yaml_tree.h"

namespace caldera {
namespace {

// What a registry says of a name is the fault, word for word.
template <class Lookup>
void check_name(const ReadState& state, const std::string& path, const Lookup& look_up) {
  try {
    look_up();
  } catch (const ConfigError& error) {
    state.fault(path, error.what());
  }
}

void check_template(const ReadState& state, const std::string& path, const std::string& name) {
  if (!name.empty()) check_name(state, path, [&] { find_template(name); });
}

// A stage's name becomes a folder, so it is never a path; and it stands for the stage in overrides, so it is
// no index.
bool is_stage_name(const std::string& name) {
  const auto is_digit = [](unsigned char c) { return std::isdigit(c) != 0; };
  const auto is_allowed = [](unsigned char c) { return std::isalnum(c) != 0 || c == '_' || c == '-'; };
  return std::all_of(name.begin(), name.end(), is_allowed) &&
         !std::all_of(name.begin(), name.end(), is_digit);
}

void check_schedule(const ReadState& state, const std::string& path, const OptimizerConfig& optimizer) {
  const std::string& type = optimizer.lr_scheduler_type;
  if (optimizer.warmup_steps && type == "constant")
    state.fault(path + ".warmup_steps",
                "conflicts with lr_scheduler_type: constant, which has no warm-up; constant_with_warmup has");
  if (type == "cosine_with_min_lr") {
    if (!optimizer.min_lr && !optimizer.min_lr_rate)
      state.fault(path + ".lr_scheduler_type", "cosine_with_min_lr needs min_lr or min_lr_rate");
    if (optimizer.min_lr && optimizer.min_lr_rate)
      state.fault(path + ".min_lr_rate", "conflicts with min_lr, which says the same; give one of them");
    if (optimizer.min_lr && *optimizer.min_lr > optimizer.learning_rate)
      state.fault(path + ".min_lr", fmt::format("lies above learning_rate: {}", optimizer.learning_rate));
  } else {
    for (const auto& [key, value] :
         {std::pair{"min_lr", optimizer.min_lr}, {"min_lr_rate", optimizer.min_lr_rate}})
      if (value)
        state.fault(
            fmt::format("{}.{}", path, key),
            fmt::format("conflicts with lr_scheduler_type: {}; it belongs to cosine_with_min_lr", type));
  }
}

void check_stage(const ReadState& state, const std::string& path, const StageConfig& stage) {
  if (!stage.name.empty() && !is_stage_name(stage.name))
    state.fault(path + ".name",
                fmt::format("\"{}\" cannot name a folder; use letters, digits, _ and -, and not digits alone",
                            stage.name));
  check_template(state, path + ".data.conversation_template", stage.data.conversation_template);
  const auto trains = [&](const char* part) {
    return std::find(stage.trainable.begin(), stage.trainable.end(), part) != stage.trainable.end();
  };
  if (stage.optimizer.mm_projector_lr && !stage.trainable.empty() && !trains("projector"))
    state.fault(path + ".optimizer.mm_projector_lr", "conflicts with trainable, which leaves out projector");
  if (stage.optimizer.vision_tower_lr && !stage.trainable.empty() && !trains("vision_tower"))
    state.fault(path + ".optimizer.vision_tower_lr",
                "conflicts with trainable, which leaves out vision_tower");
  check_schedule(state, path + ".optimizer", stage.optimizer);
  if (stage.uses_lora() && !stage.trainable.empty() && !trains("language_model"))
    state.fault(path + ".lora", "conflicts with trainable, which leaves out language_model: the adapters are its own");
  if (stage.optimizer.master_weights == "none" && stage.dtype != "bfloat16")
    state.fault(path + ".optimizer.master_weights",
                fmt::format("conflicts with dtype: {}, where the weights {} their own masters", stage.dtype,
                            stage.dtype == "auto" ? "may be" : "are"));
  if (stage.float8 && stage.dtype != "bfloat16")
    state.fault(path + ".float8",
                fmt::format("conflicts with dtype: {}: the products are rounded to bfloat16", stage.dtype));
  if (stage.float8 && stage.uses_4bit())
    state.fault(path + ".float8", "conflicts with lora.load_in_4bit, whose weights are restored in bfloat16");
  if (stage.memory.offload_activations && !stage.gradient_checkpointing && stage.memory.budget_gb == 0)
    state.fault(path + ".memory.offload_activations",
                "needs gradient_checkpointing: true or memory.budget_gb: it moves the inputs of blocks that recompute");
  if (stage.eval_steps > 0 && stage.data.eval_data_path.empty())
    state.fault(path + ".eval_steps", "needs data.eval_data_path, the samples to evaluate on");
  if (stage.save_best &&
      (stage.eval_steps == 0 || stage.save_steps == 0 || stage.save_steps % stage.eval_steps != 0))
    state.fault(path + ".save_best",
                "needs eval_steps, and save_steps to be a multiple of it: a checkpoint's validation loss is the one "
                "of its own step");
}

// What no single key can tell.
void check_recipe(const ReadState& state, const YamlNode& root, const Recipe& recipe) {
  check_name(state, "model.mm_projector_type", [&] { make_projector(recipe.model.mm_projector_type, 1, 1); });
  const YamlNode* stages = root.find("stages");
  std::set<std::string> names;
  for (size_t i = 0; i < recipe.stages.size(); ++i) {
    const std::string path = FieldReader::element_path("stages", *stages, i);
    check_stage(state, path, recipe.stages[i]);
    if (!recipe.stages[i].name.empty() && !names.insert(recipe.stages[i].name).second)
      state.fault(path + ".name", fmt::format("\"{}\" names an earlier stage too", recipe.stages[i].name));
  }
  if (recipe.distributed.shard_within == "node" && recipe.distributed.strategy == "ddp")
    state.fault("distributed.shard_within", "conflicts with strategy ddp, under which every rank holds all");
  if (recipe.evaluation)
    check_template(state, "evaluation.conversation_template", recipe.evaluation->conversation_template);
}

std::vector<FieldReference::Section> reference_sections() {
  Recipe recipe;
  FieldReference reference;
  fields(reference, recipe);
  return reference.sections();
}

}  // namespace

Recipe read_recipe(const fs::path& file, const std::vector<std::string>& overrides) {
  CALDERA_CHECK(fs::is_regular_file(file), ConfigError, "{}: no such recipe", file.string());
  return parse_recipe(read_file(file), file.string(), overrides);
}

Recipe parse_recipe(const std::string& yaml, const std::string& source,
                    const std::vector<std::string>& overrides) {
  Faults faults;
  YamlNode root = parse_yaml(yaml, source, faults);
  if (root.kind == YamlNode::Kind::kNull) root.where = {source, 1, 1};
  if (root.kind != YamlNode::Kind::kMap && root.kind != YamlNode::Kind::kRefused)
    faults.add(root.where, "",
               fmt::format("expected a recipe (model, stages, output), got {}", root.describe()));
  if (root.kind != YamlNode::Kind::kMap) faults.throw_if_any();
  for (const std::string& override_ : overrides) apply_override(root, override_, faults);

  ReadState state{.faults = faults, .where = {{"", root.where}}};
  for (const FieldReference::Section& section : reference_sections())
    for (const std::string& name : section.names) state.homes.emplace(name, section.path);
  Recipe recipe;
  FieldReader reader(state, root, "");
  fields(reader, recipe);
  reader.finish();
  check_recipe(state, root, recipe);
  faults.throw_if_any();
  return recipe;
}

std::string dump_recipe(const Recipe& recipe) {
  Recipe copy = recipe;
  FieldWriter writer;
  fields(writer, copy);
  return writer.text();
}

std::string recipe_reference() {
  std::string text =
      "# Recipes\n\n"
      "A recipe is one YAML file that holds a whole run: the model's parts, the stages of training, where "
      "the results go. Names\n"
      "follow LLaVA and Hugging Face. Paths are relative to the directory in which `caldera` is started; a "
      "leading `~` and each\n"
      "`${NAME}` of the environment are expanded in them. Published recipes are in `configs/`.\n\n"
      "Single settings can be replaced on the command line, a stage named by its `name` or its index:\n\n"
      "```\n"
      "caldera train configs/scenes/scenes.yaml stages.pretrain.optimizer.learning_rate=1e-3 seed=1\n"
      "```\n\n"
      "Everything is checked before anything is loaded, and all faults are reported at once, each with its "
      "place:\n\n"
      "```\n"
      "my.yaml:14:7: stages.pretrain.optimizer.lerning_rate: unknown key; did you mean \"learning_rate\"?\n"
      "```\n\n"
      "Values are strict: truth is `true` or `false`, an integer has no fraction, exponent or leading zero, "
      "`null` clears an optional\n"
      "setting. Duplicate keys, anchors, aliases, tags, tabs as indentation and values over several lines "
      "are refused. The resolved\n"
      "recipe, defaults filled in, is written to the run's folder as `recipe.yaml`; reading it gives the "
      "same run.\n\n"
      "A run that goes on (`--resume`) must have the settings that it was begun with, except for what does "
      "not touch the "
      "numbers:\n"
      "saving, evaluating, memory, threads, `distributed` and, under `loss: token_mean`, "
      "`max_tokens_per_micro_batch`. `max_steps` and\n"
      "`num_train_epochs` may change where the learning rate of the steps to come stays what it was "
      "(`constant`); "
      "under other schedules\n"
      "`--extend` goes on all the same, and says how the rate jumps.\n\n"
      "This page is made from the declarations in `train/recipe_fields.h`; `build/caldera recipe reference > "
      "docs/recipe.md` renews it.\n";
  for (const FieldReference::Section& section : reference_sections()) {
    text +=
        fmt::format("\n## {}\n\n", section.path.empty() ? "The recipe" : fmt::format("`{}`", section.path));
    text += "| key | type | default | allowed | meaning |\n| --- | --- | --- | --- | --- |\n" + section.rows;
  }
  return text;
}

}  // namespace caldera
