// caldera train RECIPE.yaml [--stage NAME] [--resume auto|never|DIR] [key.path=value ...]
// One process, or one of the ranks that caldera launch, torchrun, mpirun or srun started.
#include "cli/train.h"

#include <time.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <optional>

#include "base/error.h"
#include "base/files.h"
#include "base/folder_lock.h"
#include "base/strings.h"
#include "cli/command.h"
#include "cli/train_profile.h"
#include "cli/train_progress.h"
#include "eval/html.h"
#include "eval/report.h"
#include "train/run.h"

namespace caldera {
namespace {

volatile std::sig_atomic_t g_signal = 0;
std::atomic<int64_t> g_signal_ms = 0;  // when it came
static_assert(std::atomic<int64_t>::is_always_lock_free);

// The first signal asks for a checkpoint at the end of the step. Schedulers and launchers send it to every process of a job, so
// it may come twice; only Ctrl-C that is pressed again some seconds later ends the process at once.
void on_signal(int signal) {
  constexpr int64_t kRepeats_ms = 3000;
  timespec time{};
  ::clock_gettime(CLOCK_MONOTONIC, &time);
  const int64_t now_ms = time.tv_sec * 1000 + time.tv_nsec / 1000000;
  if (g_signal == 0) {
    g_signal_ms = now_ms;
    g_signal = signal;
  } else if (signal == SIGINT && now_ms - g_signal_ms > kRepeats_ms) {
    std::signal(SIGINT, SIG_DFL);
    ::raise(SIGINT);
  }
}

// What the run measured on held-out data, for the terminal; results.json and report.html say more.
void print_summary(const Recipe& recipe, const HeldoutResult& result) {
  const auto row = [](const std::string& name, const Tally& tally) {
    fmt::print(stderr, "  {:<12} {:>5} {:>10.1f}% {:>17.1f}%\n", name, tally.num_questions,
               100 * tally.exact_match(), 100 * tally.exact_match_blind());
  };
  fmt::print(stderr, "\nheld-out data, after {} of training steps\n", human_duration(train_seconds(recipe)));
  if (result.nll_right && result.nll_shuffled)
    fmt::print(stderr,
               "  loss per token: {:.3f} with the right picture, {:.3f} with another sample's ({:+.3f})\n",
               *result.nll_right, *result.nll_shuffled, *result.nll_shuffled - *result.nll_right);
  if (result.all.num_questions > 0) {
    fmt::print(stderr, "  {:<12} {:>5} {:>11} {:>18}\n", "question", "asked", "right", "without looking");
    for (const auto& [type, tally] : result.by_type) row(type, tally);
    row("all", result.all);
    for (const auto& [held_out, tally] : result.by_held_out)
      row(held_out ? "new kinds" : "known kinds", tally);
  }
  const fs::path output = recipe.output;
  const auto shown = std::find_if(result.answers.begin(), result.answers.end(),
                                  [](const HeldoutAnswer& answer) { return !answer.image.empty(); });
  const bool has_picture = shown != result.answers.end();
  fmt::print(stderr, "\n  {}\n", (output / "report.html").string());
  if (has_picture && recipe.evaluation->num_sheet > 0)
    fmt::print(stderr, "  {}\n", (output / "sheet.png").string());
  if (has_picture)
    fmt::print(stderr, "\nask it more:\n  build/caldera generate --model {} --image {} --prompt {}\n",
               shell_quote(output.string()),
               shell_quote((fs::path(recipe.evaluation->image_folder) / shown->image).string()),
               shell_quote(shown->question));
}

// Ends a rank whose training thread is stuck; called on the thread that watches over the ranks.
[[noreturn]] void abort_rank(const std::string& message) {
  fmt::print(stderr, "error: {}\n", message);
  std::fflush(stderr);
  std::_Exit(DistributedError("").exit_code());
}

// The run's folder, for this process alone. Where another has it, all ranks say so.
void lock_output(const Recipe& recipe, World& world, std::optional<FolderLock>& lock) {
  try {
    // NFS keeps a lock for a minute and a half after its machine has gone: a restart waits for that.
    constexpr int kMoment_s = 3, kLease_s = 120;
    lock.emplace(recipe.output, "output", world.spec().attempt > 0 ? kLease_s : kMoment_s);
  } catch (const std::exception&) {
    world.fail(std::current_exception());
  }
}

void train(const TrainCommand& command) {
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) std::signal(signal, on_signal);
  Recipe recipe = read_recipe(command.recipe, command.overrides);
  const WorldSpec spec = world_from_environment();
  tune_allocator();
  std::optional<FolderLock> lock;  // until the evaluation's last file
  Outcome outcome;
  int stop_signal = 0;
  {
    // A launcher keeps a log of each rank; without one the first rank speaks for all.
    TrainProgress progress(/*is_quiet=*/spec.rank > 0 && spec.started_by != "caldera launch");
    World world(spec, choose_device(recipe.device, spec.local_rank), recipe.distributed.timeout_s,
                abort_rank);
    RunOptions run = command.run;
    run.world = &world;
    run.version = kVersion;
    if (world.is_first()) lock_output(recipe, world, lock);
    recipe = choose_dtypes(std::move(recipe), run);
    ProfiledSteps profiled(recipe, command.profile_steps, spec.size, progress);
    const bool is_profiled = command.profile_steps > 0 && spec.rank == 0;
    TrainingObserver& observer = is_profiled ? static_cast<TrainingObserver&>(profiled) : progress;
    outcome = run_recipe(recipe, run, observer, [] { return static_cast<int>(g_signal); });
    stop_signal = progress.stop_signal();
  }
  if (outcome == Outcome::kStopped)
    throw Error(
        fmt::format("stopped by signal {} after saving; the same command goes on from there", stop_signal),
        128 + stop_signal);
  if (!command.run.only_stage.empty() && command.run.only_stage != recipe.stages.back().name) return;
  if (spec.rank > 0) return;
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) std::signal(signal, SIG_DFL);
  if (const int signal = g_signal)
    throw Error(fmt::format("stopped by signal {} after training; the same command goes on with the evaluation", signal),
                128 + signal);
  if (const std::optional<HeldoutResult> result = evaluate_run(recipe, progress_line()))
    print_summary(recipe, *result);
}

}  // namespace

void add_train_options(CLI::App& command, TrainCommand& options) {
  command.add_option("recipe", options.recipe, "the recipe, a YAML file")->required();
  command.add_option("overrides", options.overrides,
                     "settings that replace the recipe's, as stages.finetune.max_steps=10");
  command.add_option("--stage", options.run.only_stage, "train this stage only");
  command
      .add_option("--resume", options.run.resume,
                  "auto: go on where the run's folder stands; never: start anew; or a checkpoint's folder")
      ->capture_default_str();
  command.add_flag("--extend", options.run.extend,
                   "go on to another number of steps (max_steps, num_train_epochs), although the learning rate jumps");
  command
      .add_option("--profile", options.profile_steps,
                  "record so many steps of each stage: a table and a Chrome trace in the stage's folder")
      ->check(CLI::Range(1, 1000));
}

void setup_train(CLI::App& command) {
  auto options = std::make_shared<TrainCommand>();
  add_train_options(command, *options);
  command.callback([options] { train(*options); });
}

}  // namespace caldera
