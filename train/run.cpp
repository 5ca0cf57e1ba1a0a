#include "train/run.h"

#include <malloc.h>

#include <algorithm>
#include <sstream>

#include "base/cpu_allocator.h"
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
  constexpr std::array kKeys = {"save_steps:",
                                "save_total_limit:",
                                "save_best:",
                                "eval_steps:",
                                "logging_steps:",
                                "async_save:",
                                "gradient_checkpointing:",
                                "budget_gb:",
                                "offload_optimizer:",
                                "dataloader_num_workers:",
                                "eval_data_path:"};
  const std::string line = strip(yaml_line);
  return std::any_of(kKeys.begin(), kKeys.end(), [&](const char* key) { return line.starts_with(key); });
}

void check_same_recipe(const fs::path& checkpoint, const CheckpointState& state, const Recipe& recipe,
                       const StageConfig& stage) {
  const auto lines_of = [](const std::string& yaml) {
    std::vector<std::string> lines = split(yaml, "\n");
    std::erase_if(lines, may_change);
    return lines;
  };
  const std::vector<std::string> before = lines_of(state.recipe), now = lines_of(recipe_part(recipe, stage));
  for (size_t i = 0; i < std::max(before.size(), now.size()); ++i) {
    const std::string old_line = i < before.size() ? before[i] : "", new_line = i < now.size() ? now[i] : "";
    CALDERA_CHECK(old_line == new_line, ConfigError,
                  "{}: stage {} was begun with \"{}\", the recipe now says \"{}\"; set it back, or start "
                  "anew with --resume never",
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

std::optional<fs::path> checkpoint_to_resume(const Recipe& recipe, const StageConfig& stage,
                                             const std::string& resume) {
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

// What is done once for all ranks, by the first: its result, as text. The others wait for it.
std::string once(World& world, const std::function<std::string()>& work) {
  return world.from_first(world.is_first() ? work() : "");
}

Outcome run_stages(const Recipe& recipe, const RunOptions& options, TrainingObserver& observer,
                   const std::function<int()>& stop_requested, World& world) {
  const fs::path output = recipe.output;
  std::vector<std::string> names;
  for (const StageConfig& stage : recipe.stages) names.push_back(stage.name);
  CALDERA_CHECK(
      options.only_stage.empty() || std::find(names.begin(), names.end(), options.only_stage) != names.end(),
      ConfigError, "--stage {}: the recipe has no such stage{}", options.only_stage,
      suggestion(options.only_stage, names));

  for (const StageConfig& stage : recipe.stages)
    CALDERA_CHECK(recipe.distributed.strategy != "zero3" || !world.has_group() || stage.gradient_checkpointing,
                  ConfigError,
                  "distributed.strategy zero3 has a block's weights only while it runs: also set "
                  "stages.{}.gradient_checkpointing: true",
                  stage.name);

  // What is there already, and what will be needed: all of it is looked at before the first step.
  world.at(0, "reading the data");
  std::vector<size_t> to_do;
  std::vector<StageData> data;
  for (size_t i = 0; i < recipe.stages.size(); ++i) {
    const StageConfig& stage = recipe.stages[i];
    if (!options.only_stage.empty() && stage.name != options.only_stage) continue;
    const std::string finished = once(world, [&] {
      if (options.resume == "never") move_aside(output / stage.name);
      return fs::exists(output / stage.name / "final") ? (output / stage.name / "final").string()
                                                       : std::string();
    });
    if (!finished.empty()) {
      log_info("stage {} is finished: {}", stage.name, finished);
      continue;
    }
    to_do.push_back(i);
    data.push_back(prepare_data(recipe, stage));
  }

  once(world, [&] {
    fs::create_directories(output);
    remove_leftovers(output);
    write_file_atomic(output / "recipe.yaml", dump_recipe(recipe));
    write_json(output / "stages.json", names);
    return std::string();
  });
  for (size_t k = 0; k < to_do.size(); ++k) {
    const StageConfig& stage = recipe.stages[to_do[k]];
    const fs::path folder = output / stage.name;
    const std::string checkpoint = once(world, [&] {
      const std::optional<fs::path> found = checkpoint_to_resume(recipe, stage, options.resume);
      fs::create_directories(folder);
      remove_leftovers(folder);
      write_file_atomic(folder / "recipe.yaml", dump_recipe(recipe));
      return found ? found->string() : std::string();
    });
    Trainer trainer(recipe, to_do[k], std::move(data[k]),
                    checkpoint.empty() ? std::nullopt : std::optional<fs::path>(checkpoint), observer,
                    stop_requested, world);
    try {
      if (trainer.run() == Outcome::kStopped) return Outcome::kStopped;
    } catch (const std::exception&) {
      world.fail(std::current_exception());  // now: what the trainer still writes waits for other ranks
    }
  }
  return Outcome::kFinished;
}

}  // namespace

Outcome run_recipe(const Recipe& recipe, const RunOptions& options, TrainingObserver& observer,
                   const std::function<int()>& stop_requested) {
  World& world = options.world != nullptr ? *options.world : World::alone();
  try {
    return run_stages(recipe, options, observer, stop_requested, world);
  } catch (const std::exception&) {
    world.fail(std::current_exception());
  }
}

double train_seconds(const Recipe& recipe) {
  double total_ms = 0;
  for (const StageConfig& stage : recipe.stages) {
    const fs::path path = fs::path(recipe.output) / stage.name / "metrics.jsonl";
    if (!fs::exists(path)) continue;
    std::istringstream lines(read_file(path));
    for (std::string line; std::getline(lines, line);)
      total_ms += parse_json(line, path.string()).value("step_ms", 0.0);
  }
  return total_ms / 1000;
}

void tune_allocator() {
  use_caching_cpu_allocator();
  // oneDNN keeps the code of 1024 products by shape, and LibTorch as many descriptions beside it, half a
  // megabyte each. A packed row's shapes are new in every step and come back in the next layer, never later.
  ::setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128", /*overwrite=*/0);
  ::setenv("LRU_CACHE_CAPACITY", "16", /*overwrite=*/0);
  // The descriptions come from malloc, a quarter of a megabyte for each product: they stay with the process.
  ::mallopt(M_MMAP_THRESHOLD, 4 << 20);
  ::mallopt(M_TRIM_THRESHOLD, 64 << 20);
}

}  // namespace caldera
