#include "train/run.h"

#include <malloc.h>

#include <algorithm>
#include <sstream>
#include <utility>

#include "base/cpu.h"
#include "base/cpu_allocator.h"
#include "base/error.h"
#include "base/files.h"
#include "base/log.h"
#include "base/strings.h"
#include "model/ops/product_way.h"
#include "train/agreement.h"
#include "train/checkpoint.h"
#include "train/resume_rules.h"

namespace caldera {
namespace {

using Check = std::function<void(const Record&)>;

// Reads a file's records and checks their pictures and each record itself.
std::vector<Record> read_checked(const std::string& path, const ImageFolder& image_folder, World& world,
                                 const Check& check_record) {
  const auto show_life = [&] { world.at(0, "reading the data"); };
  show_life();
  std::vector<Record> records = read_records(path);
  check_images(records, image_folder, path, show_life);
  for (size_t i = 0; i < records.size(); ++i) {
    try {
      check_record(records[i]);
    } catch (const DataError& error) {
      throw DataError(fmt::format("{}: record {} (id \"{}\"): {}", path, i, records[i].id, error.what()));
    }
  }
  return records;
}

StageData prepare_data(const Recipe& recipe, const StageConfig& stage, World& world) {
  StageData data;
  data.format.tokenizer = load_tokenizer(tokenizer_of(recipe));
  data.format.conversation = &find_template(stage.data.conversation_template);
  data.format.image_aspect_ratio = stage.data.image_aspect_ratio;
  data.format.model_max_length = stage.data.model_max_length;
  const auto read = [&](const std::string& path) {
    std::vector<Record> records =
        read_checked(path, stage.data.images(), world, [&](const Record& record) {
          data.format.conversation->render(record.turns, /*for_generation=*/false);
        });
    // Asks for the template's control tokens.
    tokenize(records.front(), *data.format.conversation, *data.format.tokenizer);
    return records;
  };
  data.records = std::make_shared<const std::vector<Record>>(read(stage.data.data_path));
  if (!stage.data.eval_data_path.empty()) data.eval_records = read(stage.data.eval_data_path);
  return data;
}

// What the evaluation at the run's end reads: its faults are known before hours of training.
void check_evaluation(const Recipe& recipe, World& world) {
  const EvaluationConfig& config = *recipe.evaluation;
  const ConversationTemplate& conversation = find_template(config.conversation_template);
  for (const std::string& path : {config.data_path, config.captions_path}) {
    if (path.empty()) continue;
    const std::vector<Record> records =
        read_checked(path, config.image_folder, world, [&](const Record& record) {
          CALDERA_CHECK(record.turns.size() >= 2 && !record.turns.back().from_human, DataError,
                        "expected a question and its answer last, got no answer");
          conversation.render(record.turns, /*for_generation=*/false);
        });
    tokenize(records.front(), conversation, *load_tokenizer(tokenizer_of(recipe)));
  }
}

// The recipe under which the stage in this folder was begun; none where there is no stage, or a model was put there.
std::optional<Recipe> recipe_of(const fs::path& folder) {
  const fs::path file = folder / "recipe.yaml";
  if (!fs::exists(file)) return std::nullopt;
  std::vector<std::string> lines = split(read_file(file), "\n");
  std::erase_if(lines, [](const std::string& line) { return strip(line).starts_with("logging_steps:"); });
  return parse_recipe(join(lines, "\n"), file.string());
}

// A finished stage is not trained again, so it must be what the recipe says.
void check_finished(const fs::path& folder, const Recipe& recipe, const StageConfig& stage) {
  const std::optional<Recipe> before = recipe_of(folder);
  if (!before) return;
  for (const StageConfig& old : before->stages)
    if (old.name == stage.name)
      check_same_recipe(folder / "recipe.yaml", recipe_part(*before, old), recipe, stage, std::nullopt);
}

void move_aside(const fs::path& folder) {
  if (!fs::exists(folder)) return;
  const fs::path aside = old_name(folder);
  fs::rename(folder, aside);
  log_info("moved {} to {}", folder.string(), aside.string());
}

// What --resume asks for beyond "auto".
struct ResumeTask {
  bool starts_anew = false;
  std::string checkpoint;  // to go back to; "": none
  std::string stage;       // the checkpoint's; "": not known yet
  // An earlier attempt of this run has done it: later checkpoints and finished stages are the run's own.
  bool is_done = false;
};

ResumeTask resume_task(const Recipe& recipe, const RunOptions& options, const WorldSpec& spec) {
  ResumeTask task;
  if (options.resume == "auto") return task;
  const bool is_never = options.resume == "never";
  if (!is_never) task.checkpoint = options.resume;
  CALDERA_CHECK(is_never || fs::is_directory(options.resume), CheckpointError,
                "--resume {}: no such folder; expected auto, never, or a checkpoint's folder", options.resume);
  const fs::path file = fs::path(recipe.output) / "resume.json";
  if (spec.attempt > 0 && !spec.run_id.empty() && fs::exists(file)) {
    const Json done = read_json(file);
    task.is_done = done.value("run", "") == spec.run_id && done.value("resume", "") == options.resume;
    if (task.is_done) task.stage = done.value("stage", "");
  }
  task.starts_anew = is_never && !task.is_done;
  return task;
}

std::optional<fs::path> checkpoint_to_resume(const Recipe& recipe, const StageConfig& stage,
                                             const ResumeTask& task, int64_t num_samples, bool may_extend) {
  const fs::path folder = fs::path(recipe.output) / stage.name;
  const bool may_go_back = !task.checkpoint.empty() && task.stage == stage.name;
  std::optional<fs::path> checkpoint;
  if (!may_go_back || task.is_done) checkpoint = newest_checkpoint(folder);
  if (!checkpoint && may_go_back) {
    verify_checkpoint(task.checkpoint);
    checkpoint = task.checkpoint;
  }
  if (!checkpoint) return std::nullopt;
  const CheckpointState state = read_checkpoint_state(*checkpoint);
  const std::string extension =
      check_same_recipe(*checkpoint, state.recipe, recipe, stage, ResumePoint{state.step, num_samples, may_extend});
  if (!extension.empty()) log_info("{}", extension);
  const int64_t num_before = state.num_samples.value_or(num_samples);
  CALDERA_CHECK(
      num_before == num_samples, DataError,
      "{}: stage {} was begun with {} samples, {} now holds {}, and would deal them in another order; "
      "set the file back, or start anew with --resume never",
      checkpoint->string(), stage.name, num_before, stage.data.data_path, num_samples);
  return checkpoint;
}

// What is done once for all ranks, by the first: its result, as text. The others wait for it.
std::string once(World& world, const std::function<std::string()>& work) {
  return world.from_first(world.is_first() ? work() : "");
}

// Of the stage that `options` go on with; "": none, it begins.
std::string begun_dtype(const Recipe& recipe, const StageConfig& stage, const RunOptions& options,
                        const WorldSpec& spec) {
  const ResumeTask task = resume_task(recipe, options, spec);
  const bool is_asked_for = options.only_stage.empty() || stage.name == options.only_stage;
  if (is_asked_for && task.starts_anew) return "";
  if (const std::optional<Recipe> begun = recipe_of(fs::path(recipe.output) / stage.name))
    for (const StageConfig& old : begun->stages)
      if (old.name == stage.name && old.dtype != "auto") return old.dtype;
  if (task.checkpoint.empty()) return "";
  // The checkpoint of another run, of one stage.
  const std::vector<std::string> lines = split(read_checkpoint_state(task.checkpoint).recipe, "\n");
  const auto is_named = [&](const std::string& line) { return strip(line).ends_with("name: " + stage.name); };
  if (std::none_of(lines.begin(), lines.end(), is_named)) return "";
  for (const std::string& line : lines)
    if (const std::string text(strip(line)); text.starts_with("dtype: ")) return text.substr(7);
  return "";
}

struct StageInPlan {
  size_t index = 0;  // in the recipe
  StageData data;
  std::string checkpoint;  // to go on from; "": none
};

Outcome run_stages(const Recipe& recipe, const RunOptions& options, TrainingObserver& observer,
                   const std::function<int()>& stop_requested, World& world) {
  agree_on_recipe(world, recipe, options);
  const fs::path output = recipe.output;
  std::vector<std::string> names;
  for (const StageConfig& stage : recipe.stages) names.push_back(stage.name);
  CALDERA_CHECK(
      options.only_stage.empty() || std::find(names.begin(), names.end(), options.only_stage) != names.end(),
      ConfigError, "--stage {}: the recipe has no such stage{}", options.only_stage,
      suggestion(options.only_stage, names));

  for (const StageConfig& stage : recipe.stages)
    CALDERA_CHECK(
        recipe.distributed.strategy != "zero3" || !world.has_group() || stage.gradient_checkpointing,
        ConfigError,
        "distributed.strategy zero3 has a block's weights only while it runs: also set "
        "stages.{}.gradient_checkpointing: true",
        stage.name);

  // What is there already, and what will be needed: all of it is looked at before the first step.
  ResumeTask task;  // the first rank's
  if (world.is_first()) task = resume_task(recipe, options, world.spec());
  std::vector<StageInPlan> to_do;
  for (size_t i = 0; i < recipe.stages.size(); ++i) {
    const StageConfig& stage = recipe.stages[i];
    const bool is_asked_for = options.only_stage.empty() || stage.name == options.only_stage;
    world.at(0, "looking for finished stages");
    const std::string finished = once(world, [&] {
      const fs::path folder = output / stage.name;
      for (const fs::path& written : {folder, folder / "checkpoints"}) remove_leftovers(written);
      if (is_asked_for && task.starts_anew) move_aside(folder);
      if (!fs::exists(folder / "final")) return std::string();
      check_finished(folder, recipe, stage);
      return (folder / "final").string();
    });
    if (is_asked_for && finished.empty()) to_do.push_back({.index = i});
    if (is_asked_for && !finished.empty()) log_info("stage {} is finished: {}", stage.name, finished);
    if (stage.name == options.only_stage) break;
  }
  if (!task.is_done && !to_do.empty()) task.stage = recipe.stages[to_do.front().index].name;
  for (StageInPlan& planned : to_do) {
    const StageConfig& stage = recipe.stages[planned.index];
    planned.data = prepare_data(recipe, stage, world);
    agree_on_data(world, stage, planned.data);
    world.at(0, "looking for a checkpoint");
    planned.checkpoint = once(world, [&] {
      return checkpoint_to_resume(recipe, stage, task, std::ssize(*planned.data.records), options.extend)
          .value_or("")
          .string();
    });
  }
  const bool will_evaluate = options.only_stage.empty() || options.only_stage == names.back();
  once(world, [&] {
    if (recipe.evaluation && will_evaluate) check_evaluation(recipe, world);
    fs::create_directories(output);
    remove_leftovers(output);
    write_file_atomic(output / "recipe.yaml", dump_recipe(recipe));
    write_json(output / "stages.json", names);
    return std::string();
  });

  for (StageInPlan& planned : to_do) {
    const StageConfig& stage = recipe.stages[planned.index];
    const fs::path folder = output / stage.name;
    const auto checkpoint =
        planned.checkpoint.empty() ? std::nullopt : std::optional<fs::path>(planned.checkpoint);
    once(world, [&] {
      fs::create_directories(folder);
      remove_leftovers(folder);
      set_later_checkpoints_aside(folder, checkpoint);
      write_file_atomic(folder / "recipe.yaml", dump_recipe(recipe));
      const std::string& run_id = world.spec().run_id;
      if (options.resume != "auto" && !run_id.empty() && !std::exchange(task.is_done, true))
        write_json(output / "resume.json",
                   {{"run", run_id}, {"resume", options.resume}, {"stage", task.stage}});
      return std::string();
    });
    Trainer trainer(recipe, planned.index, std::move(planned.data), checkpoint, observer, stop_requested,
                    world);
    try {
      if (trainer.run() == Outcome::kStopped) return Outcome::kStopped;
    } catch (const std::exception&) {
      world.fail(std::current_exception());  // now: what the trainer still writes waits for other ranks
    }
  }
  return Outcome::kFinished;
}

Recipe chosen_dtypes(Recipe recipe, const RunOptions& options, World& world) {
  // Where only some ranks had to be told, they would wait for what the others never send.
  agree_on_recipe(world, recipe, options);
  for (StageConfig& stage : recipe.stages) {
    if (stage.dtype != "auto") continue;
    stage.dtype = once(world, [&] {
      if (const std::string begun = begun_dtype(recipe, stage, options, world.spec()); !begun.empty())
        return begun;
      const bool on_gpu = trains_on_gpu(recipe);
      const std::string chosen = on_gpu || trains_fastest_in() == at::kBFloat16 ? "bfloat16" : "float32";
      log_info("stages.{}.dtype: auto is {}, what {} computes fastest", stage.name, chosen,
               on_gpu ? "a GPU" : fmt::format("this processor ({})", cpu_text()));
      return chosen;
    });
  }
  return recipe;
}

// What `work` returns; what it throws on one rank ends all of them.
template <class Work>
auto failing_together(World& world, const Work& work) {
  try {
    return work();
  } catch (const ThrownByAll&) {
    throw;
  } catch (const std::exception&) {
    world.fail(std::current_exception());
  }
}

}  // namespace

Recipe choose_dtypes(Recipe recipe, const RunOptions& options) {
  World& world = options.world != nullptr ? *options.world : World::alone();
  return failing_together(world, [&] { return chosen_dtypes(std::move(recipe), options, world); });
}

Outcome run_recipe(const Recipe& recipe, const RunOptions& options, TrainingObserver& observer,
                   const std::function<int()>& stop_requested) {
  World& world = options.world != nullptr ? *options.world : World::alone();
  return failing_together(world, [&] { return run_stages(recipe, options, observer, stop_requested, world); });
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
