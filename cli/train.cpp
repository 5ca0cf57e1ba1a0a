// caldera train RECIPE.yaml [--stage NAME] [--resume auto|never|DIR] [key.path=value ...]
#include <csignal>

#include "base/error.h"
#include "cli/command.h"
#include "cli/train_progress.h"
#include "train/run.h"

namespace caldera {
namespace {

volatile std::sig_atomic_t g_signal = 0;

// The first signal asks for a checkpoint at the end of the step; a second one ends the process as signals do.
void on_signal(int signal) {
  g_signal = signal;
  std::signal(signal, SIG_DFL);
}

struct TrainCommand {
  std::string recipe;
  std::vector<std::string> overrides;
  RunOptions run;
};

void train(const TrainCommand& command) {
  const Recipe recipe = read_recipe(command.recipe, command.overrides);
  tune_allocator();
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  TrainProgress progress;
  const Outcome outcome = run_recipe(recipe, command.run, progress, [] { return g_signal != 0; });
  if (outcome == Outcome::kStopped)
    throw Error(fmt::format("stopped by signal {} after saving; the same command goes on from there", int{g_signal}),
                128 + g_signal);
}

}  // namespace

void setup_train(CLI::App& command) {
  auto options = std::make_shared<TrainCommand>();
  command.add_option("recipe", options->recipe, "the recipe, a YAML file")->required();
  command.add_option("overrides", options->overrides, "settings that replace the recipe's, as stages.finetune.max_steps=10");
  command.add_option("--stage", options->run.only_stage, "train this stage only");
  command.add_option("--resume", options->run.resume,
                     "auto: go on where the run's folder stands; never: start anew; or a checkpoint's folder")
      ->capture_default_str();
  command.callback([options] { train(*options); });
}

}  // namespace caldera
