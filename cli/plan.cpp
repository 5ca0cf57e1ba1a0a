// caldera plan RECIPE.yaml [--budget-gb N] [--json] [key.path=value ...]
#include <memory>

#include "base/error.h"
#include "base/json.h"
#include "base/strings.h"
#include "cli/command.h"
#include "train/plan.h"
#include "train/profile.h"
#include "train/run.h"
#include "train/scaling.h"
#include "train/stage.h"

namespace caldera {
namespace {

struct PlanCommand {
  std::string recipe;
  std::vector<std::string> overrides;
  double budget_gb = 0;
  bool json = false;
  std::vector<int64_t> nodes;
  int64_t gpus_per_node = 8;
  std::string gpu = "h100", stage;
  double utilization = 0.5;
};

std::string bytes(int64_t count) { return human_bytes(static_cast<double>(count)); }

Json to_json(const MemoryPlan& m) {
  return {{"total", m.total()},           {"program", m.program},     {"weights", m.weights},
          {"masters", m.masters},         {"states", m.states},       {"gradients", m.gradients},
          {"activations", m.activations}, {"workspace", m.workspace}, {"moment", m.moment}};
}

void print_json(const std::vector<StagePlan>& plans) {
  Json list = Json::array();
  for (const StagePlan& p : plans)
    list.push_back({{"name", p.name},
                    {"num_steps", p.num_steps},
                    {"num_tokens", p.num_tokens},
                    {"num_trainable", p.num_trainable},
                    {"flops_per_step", p.flops_per_step},
                    {"num_blocks", p.num_blocks},
                    {"num_recomputed_mlps", p.num_recomputed_mlps()},
                    {"num_recomputed_blocks", p.num_recomputed_blocks()},
                    {"memory", to_json(p.memory)},
                    {"num_offloaded_inputs", p.num_offloaded_inputs()},
                    {"least_memory", to_json(p.least_memory)}});
  fmt::print("{}\n", json_line(list));
}

// What a step's products take on this machine, where it is one that can train the recipe.
std::string time_of(const Recipe& recipe, const StageConfig& stage, const StagePlan& plan) {
  const at::Device here = choose_device("auto", 0);
  if (recipe.device == "cuda" && !here.is_cuda()) return " (there is no GPU here to tell the time by)";
  const at::Device device = choose_device(recipe.device, 0);
  const double seconds = plan.flops_per_step / measured_matmul_flops(parse_dtype(stage.dtype), device);
  return fmt::format(": {:.2f} s at this {}'s full speed, so about {} in all", seconds, device.is_cuda() ? "GPU" : "CPU",
                     human_duration(1.6 * seconds * static_cast<double>(plan.num_steps)));
}

void print_advice(const StageConfig& stage, const StagePlan& plan, double budget_gb) {
  const double budget = budget_gb * 1e9;
  const auto fits = [&](const MemoryPlan& memory) { return static_cast<double>(memory.total()) <= budget; };
  if (fits(plan.memory)) {
    fmt::print("  fits in {:.1f} GB\n", budget_gb);
    return;
  }
  fmt::print("  does NOT fit in {:.1f} GB. What helps:\n", budget_gb);
  if (plan.least_memory.total() < plan.memory.total())
    fmt::print("    memory.budget_gb: {}   {}\n", budget_gb,
               fits(plan.least_memory)
                   ? "recomputes as much as it takes; same numbers, up to a quarter more time"
                   : fmt::format("not enough alone: {} with all blocks recomputing{}", bytes(plan.least_memory.total()),
                                 plan.on_gpu ? " and their inputs in host memory" : ""));
  for (const std::string& way : ways_to_take_less(stage, plan)) fmt::print("    {}\n", way);
}

Cluster cluster_of(const PlanCommand& command, int64_t num_nodes) {
  return {.gpu = find_gpu(command.gpu),
          .num_nodes = num_nodes,
          .gpus_per_node = command.gpus_per_node,
          .utilization = command.utilization};
}

void print_scaling_json(const Recipe& recipe, const StageConfig& stage, const PlanCommand& command) {
  for (const int64_t nodes : command.nodes) {
    const ScalingPoint p = scale(recipe, stage, cluster_of(command, nodes));
    fmt::print("{}\n", json_line({{"stage", stage.name},
                                  {"num_ranks", p.num_ranks},
                                  {"samples_per_rank", p.samples_per_rank},
                                  {"imbalance", p.imbalance},
                                  {"num_micro_batches", p.num_rounds},
                                  {"compute_s", p.compute_s},
                                  {"update_s", p.update_s},
                                  {"exposed_s", p.exposed_s},
                                  {"step_s", p.step_s},
                                  {"tokens_per_second", p.tokens_per_second},
                                  {"efficiency", p.efficiency},
                                  {"memory_bytes", p.memory_bytes},
                                  {"sent_bytes", p.sent_bytes},
                                  {"num_collectives", p.num_collectives},
                                  {"num_bytes", p.num_bytes}}));
  }
}

// One row a cluster size.
void print_scaling(const Recipe& recipe, const StageConfig& stage, const PlanCommand& command) {
  fmt::print("stage {} on {}s, {} a machine, at {:.0f}% of their peak; {}\n", stage.name, command.gpu,
             command.gpus_per_node, 100 * command.utilization, recipe.distributed.strategy);
  fmt::print("  {:>5}  {:>11}  {:>9}  {:>9}  {:>8}  {:>9}  {:>7}  {:>10}  {:>10}  {:>8}  {:>8}\n", "GPUs",
             "samples/GPU", "imbalance", "compute s", "update s", "exposed s", "step s", "tokens/s",
             "efficiency", "GB sent", "GB held");
  for (const int64_t nodes : command.nodes) {
    const ScalingPoint p = scale(recipe, stage, cluster_of(command, nodes));
    fmt::print(
        "  {:>5}  {:>11.1f}  {:>9.2f}  {:>9.3f}  {:>8.3f}  {:>9.3f}  {:>7.3f}  {:>10.0f}  {:>9.0f}%  "
        "{:>8.1f}  "
        "{:>8.1f}\n",
        p.num_ranks, p.samples_per_rank, p.imbalance, p.compute_s, p.update_s, p.exposed_s, p.step_s,
        p.tokens_per_second, 100 * p.efficiency, p.sent_bytes / 1e9, p.memory_bytes / 1e9);
  }
}

void plan(const PlanCommand& command) {
  Recipe recipe = read_recipe(command.recipe, command.overrides);
  if (!command.nodes.empty()) recipe.device = "cuda";  // whatever this machine has
  recipe = choose_dtypes(std::move(recipe));
  if (!command.nodes.empty()) {
    for (const StageConfig& stage : recipe.stages)
      if (command.stage.empty() || command.stage == stage.name)
        (command.json ? print_scaling_json : print_scaling)(recipe, stage, command);
    return;
  }
  const std::vector<StagePlan> plans = plan_recipe(recipe);
  if (command.json) return print_json(plans);
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
    fmt::print("  time     {} of products a step{}\n", human_flops(p.flops_per_step), time_of(recipe, stage, p));
    if (p.choices.recomputed_halves > 0)
      fmt::print("  blocks   in the backward pass {}\n", what_recomputes(p));
    const MemoryPlan& m = p.memory;
    fmt::print("  memory   {} at the most, at {}\n", bytes(m.total()), m.moment);
    for (const auto& [name, value] : {std::pair{"program and pictures", m.program},
                                      {"weights", m.weights},
                                      {"weights, packed", m.packed},
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
  command
      .add_option("--nodes", options->nodes,
                  "how a step would go on so many machines with GPUs, e.g. 1,2,4: no GPU is needed to ask")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  command.add_option("--gpus-per-node", options->gpus_per_node, "GPUs of a machine (with --nodes)")
      ->check(CLI::PositiveNumber);
  command.add_option("--gpu", options->gpu, "a100, h100, h200 or b200 (with --nodes)");
  command
      .add_option("--utilization", options->utilization,
                  "share of the GPU's peak that the products of a step reach (with --nodes)")
      ->check(CLI::Range(0.01, 1.0));
  command.add_option("--stage", options->stage, "this stage alone (with --nodes)");
  command.add_flag("--json", options->json, "numbers in bytes, for programs");
  command.callback([options] { plan(*options); });
}

}  // namespace caldera
