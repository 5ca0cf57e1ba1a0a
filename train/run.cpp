#include "train/run.h"

#include <malloc.h>

#include <algorithm>
#include <sstream>

#include "base/error.h"
#include "base/files.h"
#include "base/log.h"
#include "base/strings.h"
#include "train/checkpoint.h"

namespace caldera {
namespace {

StageData prepare_data(const Recipe& recipe, const StageConfig& stage) {
  StageData data;
  data.format.tokenizer = load_tokenizer(tokenizer_of(recipe));
  data.format.conversation = &find_template(stage.data.conversation_template);
  data.format.image_aspect_ratio = stage.data.image_aspect_ratio;
  data.format.model_max_length = stage.data.model_max_length;
  const auto read = [&](const std::string& path) {
    std::vector<Record> records = read_records(path);
    CALDERA_CHECK(!records.empty(), DataError, "{}: holds no sample", path);
    check_images(records, stage.data.image_folder, path);
    return records;
  };
  data.records = std::make_shared<const std::vector<Record>>(read(stage.data.data_path));
  if (!stage.data.eval_data_path.empty()) data.eval_records = read(stage.data.eval_data_path);
  return data;
}

// Settings that may change when a run goes on: they do not touch what is computed.
bool may_change(const std::string& yaml_line) {
  constexpr std::array kKeys = {"save_steps:", "save_total_limit:", "eval_steps:", "logging_steps:",
                                "dataloader_num_workers:", "eval_data_path:"};
  const std::string line = strip(yaml_line);
  return std::any_of(kKeys.begin(), kKeys.end(), [&](const char* key) { return line.starts_with(key); });
}

void check_same_recipe(const fs::path& checkpoint, const CheckpointState& state, const Recipe& recipe,
                       const StageConfig& stage) {
  const std::vector<std::string> before = split(state.recipe, "\n"), now = split(recipe_part(recipe, stage), "\n");
  for (size_t i = 0; i < std::max(before.size(), now.size()); ++i) {
    const std::string old_line = i < before.size() ? before[i] : "", new_line = i < now.size() ? now[i] : "";
    CALDERA_CHECK(old_line == new_line || (may_change(old_line) && may_change(new_line)), ConfigError,
                  "{}: stage {} was begun with \"{}\", the recipe now says \"{}\"; set it back, or start anew with --resume never",
                  checkpoint.string(), stage.name, strip(old_line), strip(new_line));
  }
}

void move_aside(const fs::path& folder) {
  if (!fs::exists(folder)) return;
  int number = 1;
  const auto name = [&] { return fs::path(fmt::format("{}.old-{}", folder.string(), number)); };
  while (fs::exists(name())) ++number;
  fs::rename(folder, name());
  log_info("moved {} to {}", folder.string(), name().string());
}

std::optional<fs::path> checkpoint_to_resume(const Recipe& recipe, const StageConfig& stage, const std::string& resume) {
  const fs::path folder = fs::path(recipe.output) / stage.name;
  std::optional<fs::path> checkpoint;
  if (resume == "auto") {
    checkpoint = newest_checkpoint(folder);
  } else if (resume != "never") {
    verify_checkpoint(resume);
    checkpoint = resume;
  }
  if (checkpoint) check_same_recipe(*checkpoint, read_checkpoint_state(*checkpoint), recipe, stage);
  return checkpoint;
}

}  // namespace

Outcome run_recipe(const Recipe& recipe, const RunOptions& options, TrainingObserver& observer,
                   const std::function<bool()>& stop_requested) {
  const fs::path output = recipe.output;
  std::vector<std::string> names;
  for (const StageConfig& stage : recipe.stages) names.push_back(stage.name);
  CALDERA_CHECK(options.only_stage.empty() || std::find(names.begin(), names.end(), options.only_stage) != names.end(),
                ConfigError, "--stage {}: the recipe has no such stage{}", options.only_stage,
                suggestion(options.only_stage, names));

  // What is there already, and what will be needed: all of it is looked at before the first step.
  std::vector<size_t> to_do;
  std::vector<StageData> data;
  for (size_t i = 0; i < recipe.stages.size(); ++i) {
    const StageConfig& stage = recipe.stages[i];
    if (!options.only_stage.empty() && stage.name != options.only_stage) continue;
    if (options.resume == "never") move_aside(output / stage.name);
    if (fs::exists(output / stage.name / "final")) {
      log_info("stage {} is finished: {}", stage.name, (output / stage.name / "final").string());
      continue;
    }
    to_do.push_back(i);
    data.push_back(prepare_data(recipe, stage));
  }

  fs::create_directories(output);
  remove_leftovers(output);
  write_file_atomic(output / "recipe.yaml", dump_recipe(recipe));
  write_json(output / "stages.json", names);
  for (size_t k = 0; k < to_do.size(); ++k) {
    const StageConfig& stage = recipe.stages[to_do[k]];
    const fs::path folder = output / stage.name;
    const std::optional<fs::path> checkpoint = checkpoint_to_resume(recipe, stage, options.resume);
    fs::create_directories(folder);
    remove_leftovers(folder);
    write_file_atomic(folder / "recipe.yaml", dump_recipe(recipe));
    Trainer trainer(recipe, to_do[k], std::move(data[k]), checkpoint, observer, stop_requested);
    if (trainer.run() == Outcome::kStopped) return Outcome::kStopped;
  }
  return Outcome::kFinished;
}

double train_seconds(const Recipe& recipe) {
  double total_ms = 0;
  for (const StageConfig& stage : recipe.stages) {
    const fs::path path = fs::path(recipe.output) / stage.name / "metrics.jsonl";
    if (!fs::exists(path)) continue;
    std::istringstream lines(read_file(path));
    for (std::string line; std::getline(lines, line);) total_ms += parse_json(line, path.string()).value("step_ms", 0.0);
  }
  return total_ms / 1000;
}

void tune_allocator() {
  ::mallopt(M_MMAP_MAX, 0);
  ::mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
  ::mallopt(M_TOP_PAD, 256 << 20);
}

}  // namespace caldera
