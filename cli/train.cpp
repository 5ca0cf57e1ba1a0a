// caldera train RECIPE.yaml [--stage NAME] [--resume auto|never|DIR] [key.path=value ...]
#include <csignal>

#include "base/error.h"
#include "base/files.h"
#include "base/strings.h"
#include "cli/command.h"
#include "cli/train_progress.h"
#include "eval/html.h"
#include "eval/report.h"
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

// What the run measured on held-out data, for the terminal; results.json and report.html say more.
void print_summary(const Recipe& recipe, const HeldoutResult& result) {
  const auto row = [](const std::string& name, const Tally& tally) {
    fmt::print(stderr, "  {:<12} {:>5} {:>10.1f}% {:>17.1f}%\n", name, tally.num_questions, 100 * tally.exact_match(),
               100 * tally.exact_match_blind());
  };
  fmt::print(stderr, "\nheld-out data, after {} of training steps\n", human_duration(train_seconds(recipe)));
  if (result.nll_right && result.nll_shuffled)
    fmt::print(stderr, "  loss per token: {:.3f} with the right picture, {:.3f} with another sample's ({:+.3f})\n",
               *result.nll_right, *result.nll_shuffled, *result.nll_shuffled - *result.nll_right);
  if (result.all.num_questions > 0) {
    fmt::print(stderr, "  {:<12} {:>5} {:>11} {:>18}\n", "question", "asked", "right", "without looking");
    for (const auto& [type, tally] : result.by_type) row(type, tally);
    row("all", result.all);
    for (const auto& [held_out, tally] : result.by_held_out) row(held_out ? "new kinds" : "known kinds", tally);
  }
  const fs::path output = recipe.output;
  fmt::print(stderr, "\n  {}\n  {}\n", (output / "report.html").string(), (output / "sheet.png").string());
  if (!result.answers.empty())
    fmt::print(stderr, "\nask it more:\n  build/caldera generate --model {} --image {} --prompt {}\n",
               shell_quote(output.string()),
               shell_quote((fs::path(recipe.evaluation->image_folder) / result.answers.front().image).string()),
               shell_quote(result.answers.front().question));
}

void train(const TrainCommand& command) {
  const Recipe recipe = read_recipe(command.recipe, command.overrides);
  tune_allocator();
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
  Outcome outcome;
  {
    TrainProgress progress;
    outcome = run_recipe(recipe, command.run, progress, [] { return g_signal != 0; });
  }
  if (outcome == Outcome::kStopped)
    throw Error(fmt::format("stopped by signal {} after saving; the same command goes on from there", int{g_signal}),
                128 + g_signal);
  if (!command.run.only_stage.empty() && command.run.only_stage != recipe.stages.back().name) return;
  std::signal(SIGINT, SIG_DFL);
  std::signal(SIGTERM, SIG_DFL);
  if (const std::optional<HeldoutResult> result = evaluate_run(recipe, progress_line())) print_summary(recipe, *result);
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
