#include "cli/train_progress.h"

#include <unistd.h>

#include <cstdio>

#include "base/log.h"
#include "base/strings.h"

namespace caldera {

TrainProgress::TrainProgress(bool is_quiet)
    : is_terminal_(::isatty(STDERR_FILENO) == 1), is_quiet_(is_quiet) {
  set_log_sink([this](LogLevel level, const std::string& line) {
    if (level == LogLevel::kWarning || !is_quiet_)
      print_line((level == LogLevel::kWarning ? "warning: " : "") + line);
  });
}

TrainProgress::~TrainProgress() {
  clear_live();
  set_log_sink([](LogLevel level, const std::string& line) {
    fmt::print(stderr, "{}{}\n", level == LogLevel::kWarning ? "warning: " : "", line);
  });
}

void TrainProgress::clear_live() {
  if (live_) fmt::print(stderr, "\r\033[K");
  live_ = false;
}

void TrainProgress::print_line(const std::string& line) {
  clear_live();
  fmt::print(stderr, "{}\n", line);
}

void TrainProgress::on_stage(const StageStart& stage) {
  if (is_quiet_) return;
  stage_ = stage;
  mean_step_ms_ = 0;
  last_shown_ = {};
  print_line(fmt::format("stage {} on {}: {} samples, {} steps; {:.1f} M of {:.1f} M parameters train; {}",
                         stage.name, stage.device, stage.num_samples, stage.num_steps,
                         static_cast<double>(stage.num_trainable) / 1e6,
                         static_cast<double>(stage.num_parameters) / 1e6, stage.folder.string()));
  print_line(stage.world);
  if (stage.first_step > 0) print_line(fmt::format("resumed after step {}", stage.first_step));
}

void TrainProgress::on_step(const StepMetrics& m) {
  if (is_quiet_) return;
  mean_step_ms_ = mean_step_ms_ == 0 ? m.step_ms : 0.9 * mean_step_ms_ + 0.1 * m.step_ms;
  const bool last = m.step == stage_.num_steps;
  const auto pause = is_terminal_ ? std::chrono::milliseconds(200) : std::chrono::milliseconds(5000);
  if (!last && Clock::now() - last_shown_ < pause) return;
  last_shown_ = Clock::now();

  const double left = static_cast<double>(stage_.num_steps - m.step) * mean_step_ms_ / 1000;
  const std::string numbers =
      fmt::format("loss {:.4f}  lr {:.2e}  {:.0f} tokens/s  {}  data {:.0f}%  ETA {}", m.loss, m.lr,
                  m.tokens_per_second, human_bytes(static_cast<double>(m.peak_memory_bytes)),
                  100 * m.data_wait_ms / m.step_ms, human_duration(left));
  if (!is_terminal_)
    return print_line(fmt::format("{} step {}/{}  {}", stage_.name, m.step, stage_.num_steps, numbers));
  constexpr int64_t kWidth = 24;
  const auto filled = static_cast<size_t>(kWidth * m.step / stage_.num_steps);
  clear_live();
  fmt::print(stderr, "{} {}{} {}/{}  {}", stage_.name, std::string(filled, '#'),
             std::string(kWidth - filled, '.'), m.step, stage_.num_steps, numbers);
  std::fflush(stderr);
  live_ = true;
  if (last) {
    fmt::print(stderr, "\n");
    live_ = false;
  }
}

void TrainProgress::on_evaluation(int64_t step, double eval_loss) {
  if (!is_quiet_) print_line(fmt::format("{} step {}: validation loss {:.4f}", stage_.name, step, eval_loss));
}

void TrainProgress::on_checkpoint(const std::filesystem::path& path) {
  if (!is_quiet_) print_line(fmt::format("saved {}", path.string()));
}

}  // namespace caldera
