#include "train/distributed/step_report.h"


#include <algorithm>
#include <cmath>

#include "base/aten.h"
#include "base/error.h"

namespace caldera {

void share(World& world, at::Device device, StepReport& report) {
  const int64_t size = world.size(), rank = world.rank();
  // loss, squared norm, then a place a rank for each of: is bad, signal, milliseconds.
  at::Tensor all = at::zeros({2 + 3 * size}, at::kDouble);
  auto at = all.accessor<double, 1>();
  at[0] = report.loss;
  at[1] = report.squared_norm;
  at[2 + rank] = std::isfinite(report.loss) ? 0 : 1;
  at[2 + size + rank] = report.stop_signal;
  at[2 + 2 * size + rank] = report.compute_ms;
  const at::Tensor on_device = all.to(device);
  world.sum(on_device)();
  world.wait_for_device();
  all.copy_(on_device);
  report.loss = at[0];
  report.squared_norm = at[1];
  report.grad_norm = std::sqrt(report.squared_norm);
  report.bad_ranks.clear();
  report.all_compute_ms.clear();
  for (int64_t r = 0; r < size; ++r) {
    if (at[2 + r] != 0) report.bad_ranks.push_back(static_cast<int>(r));
    report.stop_signal = std::max(report.stop_signal, static_cast<int>(at[2 + size + r]));
    report.all_compute_ms.push_back(at[2 + 2 * size + r]);
  }
}

void check_finite(int64_t step, const StepReport& report, const StepData& data) {
  if (std::isfinite(report.loss) && std::isfinite(report.grad_norm)) return;
  // Where one rank's loss alone is not finite, it is one of its samples.
  const std::vector<int>& bad = report.bad_ranks;
  std::vector<std::string> suspects;
  for (size_t i = 0; i < data.sample_ids.size(); ++i)
    if (bad.empty() || std::find(bad.begin(), bad.end(), data.ranks[i]) != bad.end())
      suspects.push_back(data.sample_ids[i]);
  const bool has_ranks = data.num_micro_batches.size() > 1;
  throw Error(
      fmt::format("step {}: loss {} and gradient norm {}: not finite{}. Weights are as before this step; its "
                  "samples: {}. "
                  "Look at them with `caldera data preview`, or lower the learning rate",
                  step, report.loss, report.grad_norm,
                  has_ranks && !bad.empty() ? fmt::format(" on rank {}", fmt::join(bad, ", ")) : "",
                  fmt::join(suspects, ", ")));
}

std::optional<std::string> Stragglers::look_at(int64_t step, const std::vector<double>& compute_ms,
                                               const World& world) {
  if (compute_ms.size() < 2) return std::nullopt;
  mean_ms_.resize(compute_ms.size(), 0);
  for (size_t r = 0; r < compute_ms.size(); ++r)
    mean_ms_[r] = mean_ms_[r] == 0 ? compute_ms[r] : 0.8 * mean_ms_[r] + 0.2 * compute_ms[r];
  const auto slowest = std::max_element(mean_ms_.begin(), mean_ms_.end());
  std::vector<double> others;
  for (auto it = mean_ms_.begin(); it != mean_ms_.end(); ++it)
    if (it != slowest) others.push_back(*it);
  std::nth_element(others.begin(), others.begin() + static_cast<int64_t>(others.size() / 2), others.end());
  const double median = others[others.size() / 2];
  constexpr double kNoise_ms = 20;
  if (*slowest < 2 * median + kNoise_ms) {
    num_slow_ = 0;
    return std::nullopt;
  }
  if (++num_slow_ % 100 != 5) return std::nullopt;
  return fmt::format(
      "step {}: {} is a straggler: {:.0f} ms a step, the others {:.0f} ms; it costs {:.0f} ms a step", step,
      world.who(static_cast<int>(slowest - mean_ms_.begin())), *slowest, median, *slowest - median);
}

}  // namespace caldera
