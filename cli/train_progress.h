// A training run's progress on stderr: one live line on a terminal, plain lines every few seconds elsewhere.
#pragma once
#include <chrono>
#include <string>

#include "train/trainer.h"

namespace caldera {

class TrainProgress : public TrainingObserver {
 public:
  TrainProgress();
  ~TrainProgress() override;
  void on_stage(const StageStart& stage) override;
  void on_step(const StepMetrics& metrics) override;
  void on_evaluation(int64_t step, double eval_loss) override;
  void on_checkpoint(const std::filesystem::path& path) override;

 private:
  using Clock = std::chrono::steady_clock;
  void print_line(const std::string& line);  // above the live line
  void clear_live();

  StageStart stage_;
  bool is_terminal_;
  bool live_ = false;  // whether a live line stands on the terminal
  Clock::time_point last_shown_;
  double mean_step_ms_ = 0;  // exponential moving average
};

}  // namespace caldera
