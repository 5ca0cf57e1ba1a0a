// A training run's progress on stderr: one live line on a terminal, plain lines every few seconds elsewhere.
#pragma once
#include <chrono>
#include <string>

#include "train/trainer.h"

namespace caldera {

class TrainProgress : public TrainingObserver {
 public:
  explicit TrainProgress(bool is_quiet = false);  // quiet: warnings alone
  ~TrainProgress() override;
  void on_stage(const StageStart& stage) override;
  void on_step(const StepMetrics& metrics) override;
  void on_evaluation(int64_t step, double eval_loss) override;
  void on_checkpoint(const std::filesystem::path& path) override;
  void on_stop(int signal) override { stop_signal_ = signal; }
  int stop_signal() const { return stop_signal_; }  // that ended the run early; 0: none

 private:
  using Clock = std::chrono::steady_clock;
  void print_line(const std::string& line);  // above the live line
  void clear_live();

  StageStart stage_;
  bool is_terminal_, is_quiet_;
  int stop_signal_ = 0;
  bool live_ = false;  // whether a live line stands on the terminal
  Clock::time_point last_shown_;
  double mean_step_ms_ = 0;  // exponential moving average
};

}  // namespace caldera
