// caldera plan RECIPE.yaml [--budget-gb N] [key.path=value ...]
#include <memory>

#include "base/error.h"
#include "base/strings.h"
#include "cli/command.h"
#include "train/plan.h"
#include "train/profile.h"
#include "train/trainer.h"

namespace caldera {
namespace {

struct PlanCommand {
  std::string recipe;
  std::vector<std::string> overrides;
  double budget_gb = 0;
};

std::string bytes(int64_t count) { return human_bytes(static_cast<double>(count)); }

void print_advice(const StageConfig& stage, const StagePlan& plan, double budget_gb) {
  const double budget = budget_gb * 1e9;
  const auto fits = [&](const MemoryPlan& memory) { return static_cast<double>(memory.total()) <= budget; };
  if (fits(plan.memory)) {
    fmt::print("  fits in {:.1f} GB\n", budget_gb);
    return;
  }
  fmt::print("  does NOT fit in {:.1f} GB. What helps:\n", budget_gb);
  if (!stage.gradient_checkpointing)
    fmt::print(
        "    gradient_checkpointing: true      {} ({})\n", bytes(plan.memory_recomputed.total()),
        fits(plan.memory_recomputed) ? "fits; same numbers, about a third more time" : "not enough alone");
  if (plan.largest_micro_batch > plan.longest)
    fmt::print("    max_tokens_per_micro_batch below {} (the longest sample has {} tokens); same numbers\n",
               plan.largest_micro_batch, plan.longest);
  if (plan.memory.states + plan.memory.masters + plan.memory.gradients > static_cast<int64_t>(budget / 2) &&
      !stage.uses_lora())
    fmt::print("    lora: {{}}                          weights alone stay: {}\n",
               bytes(plan.memory.weights));
  if (stage.dtype == "float32")
    fmt::print("    dtype: bfloat16                   halves weights, activations and gradients\n");
}

void plan(const PlanCommand& command) {
  const Recipe recipe = read_recipe(command.recipe, command.overrides);
  const std::vector<StagePlan> plans = plan_recipe(recipe);
  for (size_t i = 0; i < plans.size(); ++i) {
    const StagePlan& p = plans[i];
    const StageConfig& stage = recipe.stages[i];
    fmt::print("stage {}: {:.1f} M of {:.1f} M parameters train, in {}\n", p.name,
               static_cast<double>(p.num_trainable) / 1e6, static_cast<double>(p.num_parameters) / 1e6,
               stage.dtype);
    fmt::print("  data     {} samples, {} pictures, {} tokens, {} supervised ({:.0f}%)\n", p.num_samples,
               p.num_images, p.num_tokens, p.num_supervised,
               100.0 * static_cast<double>(p.num_supervised) /
                   static_cast<double>(std::max<int64_t>(p.num_tokens, 1)));
    fmt::print(
        "  lengths  {} to {} tokens, half below {}, 95% below {}{}\n", p.shortest, p.longest, p.median_length,
        p.percentile_95,
        p.num_cut > 0 ? fmt::format("; {} are cut at {}", p.num_cut, stage.data.model_max_length) : "");
    fmt::print("  steps    {} ({} an epoch), {:.1f} micro-batches each, filled to {:.0f}%\n", p.num_steps,
               p.steps_per_epoch, p.micro_batches_per_step, 100 * p.fill);
    const double seconds = p.flops_per_step / measured_matmul_flops(parse_dtype(stage.dtype));
    fmt::print(
        "  time     {:.0f} GFLOP of products a step: {:.2f} s at this CPU's full speed, so about {} in all\n",
        p.flops_per_step / 1e9, seconds, human_duration(1.6 * seconds * static_cast<double>(p.num_steps)));
    const MemoryPlan& m = p.memory;
    fmt::print("  memory   {} at the most, at {}\n", bytes(m.total()), m.moment);
    for (const auto& [name, value] : {std::pair{"program and pictures", m.program},
                                      {"weights", m.weights},
                                      {"masters", m.masters},
                                      {"optimizer states", m.states},
                                      {"gradients", m.gradients},
                                      {"activations", m.activations},
                                      {"workspace", m.workspace}})
      if (value > 0) fmt::print("    {:<22} {:>10}\n", name, bytes(value));
    if (command.budget_gb > 0) print_advice(stage, p, command.budget_gb);
  }
}

}  // namespace

void setup_plan(CLI::App& command) {
  auto options = std::make_shared<PlanCommand>();
  command.add_option("recipe", options->recipe, "the recipe, a YAML file")->required();
  command.add_option("overrides", options->overrides, "settings that replace the recipe's");
  command.add_option("--budget-gb", options->budget_gb, "say whether it fits, and what to change if not")
      ->check(CLI::PositiveNumber);
  command.callback([options] { plan(*options); });
}

}  // namespace caldera
