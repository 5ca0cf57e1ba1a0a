// caldera train --profile N: N steps of each stage under the profiler, after two that warm up.
#pragma once
#include <memory>
#include <vector>

#include "train/profile.h"
#include "train/trainer.h"

namespace caldera {

// Passes everything on to another observer.
class ProfiledSteps : public TrainingObserver {
 public:
  // Of one of `num_ranks` ranks.
  ProfiledSteps(const Recipe& recipe, int64_t num_steps, int num_ranks, TrainingObserver& next)
      : recipe_(recipe), num_steps_(num_steps), num_ranks_(num_ranks), next_(next) {}
  void on_stage(const StageStart& stage) override;
  void on_step(const StepMetrics& metrics) override;
  void on_evaluation(int64_t step, double eval_loss) override { next_.on_evaluation(step, eval_loss); }
  void on_checkpoint(const std::filesystem::path& path) override { next_.on_checkpoint(path); }
  void on_stop(int signal) override { next_.on_stop(signal); }

 private:
  void report();

  const Recipe& recipe_;
  const int64_t num_steps_;
  const int num_ranks_;
  TrainingObserver& next_;
  StageStart stage_;
  int64_t steps_seen_ = 0;
  std::vector<StepMetrics> profiled_;
  std::unique_ptr<Profiler> profiler_;
};

}  // namespace caldera
