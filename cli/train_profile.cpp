#include "cli/train_profile.h"

#include <algorithm>

#include "base/files.h"
#include "base/log.h"
#include "base/strings.h"
#include "train/plan.h"
#include "train/stage.h"

namespace caldera {
namespace {

constexpr int64_t kWarmUpSteps = 2;

}  // namespace

void ProfiledSteps::on_stage(const StageStart& stage) {
  stage_ = stage;
  steps_seen_ = 0;
  profiled_.clear();
  next_.on_stage(stage);
}

void ProfiledSteps::on_step(const StepMetrics& metrics) {
  next_.on_step(metrics);
  ++steps_seen_;
  if (profiler_) {
    profiled_.push_back(metrics);
    if (std::ssize(profiled_) == num_steps_ || metrics.step == stage_.num_steps) report();
  } else if (steps_seen_ == kWarmUpSteps && metrics.step < stage_.num_steps) {
    synchronize(at::Device(stage_.device));
    profiler_ = std::make_unique<Profiler>();
  }
}

void ProfiledSteps::report() {
  synchronize(at::Device(stage_.device));
  const fs::path trace = stage_.folder / "profile.trace.json";
  const Profile profile = profiler_->stop(trace);
  profiler_.reset();
  const auto count = std::ssize(profiled_);
  double step_ms = 0, wait_ms = 0;
  int64_t num_tokens = 0;
  for (const StepMetrics& metrics : profiled_) {
    step_ms += metrics.step_ms;
    wait_ms += metrics.data_wait_ms;
    num_tokens += metrics.num_tokens;
  }
  std::string text =
      fmt::format("{} steps of {:.1f} ms, {:.0f} tokens each; waiting for data {:.1f}%\n", count,
                  step_ms / static_cast<double>(count),
                  static_cast<double>(num_tokens) / static_cast<double>(count), 100 * wait_ms / step_ms);
  // The plan's operations are those of an average step.
  const std::vector<StagePlan> plans = plan_recipe(recipe_, /*max_samples=*/1000);
  const auto plan =
      std::find_if(plans.begin(), plans.end(), [&](const StagePlan& p) { return p.name == stage_.name; });
  const auto stage = std::find_if(recipe_.stages.begin(), recipe_.stages.end(),
                                  [&](const StageConfig& s) { return s.name == stage_.name; });
  const double peak = measured_matmul_flops(parse_dtype(stage->dtype), at::Device(stage_.device));
  const double tokens_per_planned_step =
      static_cast<double>(plan->num_tokens) / static_cast<double>(plan->steps_per_epoch);
  const double flops = plan->flops_per_step * static_cast<double>(num_tokens) / tokens_per_planned_step / num_ranks_;
  text += fmt::format("{} of products a step, {}/s: {:.0f}% of what products reach here now ({}/s)\n",
                      human_flops(flops / static_cast<double>(count)), human_flops(1000 * flops / step_ms),
                      100 * 1000 * flops / step_ms / peak, human_flops(peak));
  text += "\n" + profile_table(profile, count);
  write_file_atomic(stage_.folder / "profile.txt", text);
  log_info("profile of stage {}: {} and {}\n{}", stage_.name, (stage_.folder / "profile.txt").string(),
           trace.string(), text);
}

}  // namespace caldera
