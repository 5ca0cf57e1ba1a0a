// What every rank must know of a step before it counts, in one small sum; and who makes the others wait.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "data/loader.h"
#include "train/distributed/world.h"

namespace caldera {

// This rank's on the way in, everybody's on the way out.
struct StepReport {
  double loss = 0;          // share of the step's loss -> the step's loss
  double squared_norm = 0;  // of a share of the gradient -> of the whole
  int stop_signal = 0;      // a signal that this rank received -> that any rank received; 0: none
  double compute_ms = 0;    // forward and backward, without waiting for others
  // Out: the whole gradient's norm, the ranks whose own loss was not finite, and each rank's compute_ms.
  double grad_norm = 0;
  std::vector<int> bad_ranks;
  std::vector<double> all_compute_ms;
};
// The same bits on every rank.
void share(World& world, at::Device device, StepReport& report);

// Throws Error with the samples that may be to blame where the step's loss or gradient is not finite.
void check_finite(int64_t step, const StepReport& report, const StepData& data);

// Notices a rank whose steps take twice as long as the median's.
class Stragglers {
 public:
  // A message for the log, at the fifth slow step and again every hundred.
  std::optional<std::string> look_at(int64_t step, const std::vector<double>& compute_ms, const World& world);

 private:
  std::vector<double> mean_ms_;
  int64_t num_slow_ = 0;
};

}  // namespace caldera
