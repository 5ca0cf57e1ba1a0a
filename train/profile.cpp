#include "train/profile.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <fmt/format.h>
#include <kineto/ActivityType.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <set>
#include <unordered_map>

#include "base/error.h"
#include "base/files.h"
#include "model/ops/matmul.h"
#include "train/stage.h"

namespace caldera {
namespace {

using torch::autograd::profiler::KinetoEvent;
using torch::profiler::impl::ActivityType;

// Spans over kernels, not work.
constexpr auto kGpuAnnotation = static_cast<uint8_t>(libkineto::ActivityType::GPU_USER_ANNOTATION);

// Self times: on each thread, events nest, and an event's time is its own less that of those inside it.
void add_thread(std::vector<const KinetoEvent*> events, std::unordered_map<std::string, ProfileRow>& rows) {
  std::sort(events.begin(), events.end(), [](const KinetoEvent* a, const KinetoEvent* b) {
    return a->startNs() != b->startNs() ? a->startNs() < b->startNs() : a->endNs() > b->endNs();
  });
  std::vector<std::pair<const KinetoEvent*, double>> open;  // and the time of the events inside
  const auto close = [&] {
    const auto [event, inside_ms] = open.back();
    open.pop_back();
    const double total_ms = static_cast<double>(event->durationNs()) / 1e6;
    ProfileRow& row = rows[event->name()];
    row.name = event->name();
    ++row.count;
    row.self_ms += total_ms - inside_ms;
    row.total_ms += total_ms;
    if (!open.empty()) open.back().second += total_ms;
  };
  for (const KinetoEvent* event : events) {
    while (!open.empty() && open.back().first->endNs() <= event->startNs()) close();
    open.emplace_back(event, 0.0);
  }
  while (!open.empty()) close();
}

std::vector<ProfileRow> rows_of(std::map<uint64_t, std::vector<const KinetoEvent*>> threads) {
  std::unordered_map<std::string, ProfileRow> rows;
  for (auto& [thread, events] : threads) add_thread(std::move(events), rows);
  std::vector<ProfileRow> list;
  for (auto& [name, row] : rows) list.push_back(std::move(row));
  std::sort(list.begin(), list.end(),
            [](const ProfileRow& a, const ProfileRow& b) { return a.self_ms > b.self_ms; });
  return list;
}

std::string table_of(const std::vector<ProfileRow>& rows, const char* title, int64_t num_steps) {
  constexpr size_t kNameWidth = 72;
  std::string text = fmt::format("{:<{}} {:>10} {:>12} {:>8} {:>12}\n", title, kNameWidth, "calls/step",
                                 "self ms/step", "share", "total ms/step");
  const auto steps = static_cast<double>(std::max<int64_t>(num_steps, 1));
  double all_ms = 0;
  for (const ProfileRow& row : rows) all_ms += row.self_ms;
  for (const ProfileRow& row : rows) {
    if (row.self_ms < 0.005 * all_ms) break;
    text += fmt::format("{:<{}} {:>10.1f} {:>12.2f} {:>7.1f}% {:>12.2f}\n", row.name.substr(0, kNameWidth), kNameWidth,
                        static_cast<double>(row.count) / steps, row.self_ms / steps,
                        100 * row.self_ms / all_ms, row.total_ms / steps);
  }
  return text + fmt::format("{:<{}} {:>10} {:>12.2f}\n", "all of it", kNameWidth, "", all_ms / steps);
}

}  // namespace

Profiler::Profiler() {
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  std::set<ActivityType> activities = {ActivityType::CPU};
  if (at::hasCUDA() && at::detail::getCUDAHooks().deviceCount() > 0) activities.insert(ActivityType::CUDA);
  torch::autograd::profiler::prepareProfiler(config, activities);
  torch::autograd::profiler::enableProfiler(
      config, activities,
      {at::RecordScope::FUNCTION, at::RecordScope::USER_SCOPE, at::RecordScope::BACKWARD_FUNCTION});
  running_ = true;
}

Profiler::~Profiler() {
  if (running_) torch::autograd::profiler::disableProfiler();
}

Profile Profiler::stop(const fs::path& trace) {
  CALDERA_ASSERT(running_);
  running_ = false;
  const auto result = torch::autograd::profiler::disableProfiler();
  fs::create_directories(fs::absolute(trace).parent_path());
  result->save(trace.string());
  // Of each thread of the host, and of each stream of a GPU.
  std::map<uint64_t, std::vector<const KinetoEvent*>> threads, streams;
  uint64_t first = UINT64_MAX, last = 0;
  for (const KinetoEvent& event : result->events()) {
    if (event.durationNs() == 0) continue;
    if (event.deviceType() == c10::DeviceType::CPU)
      threads[event.startThreadId()].push_back(&event);
    else if (event.activityType() != kGpuAnnotation)
      streams[static_cast<uint64_t>(event.deviceResourceId())].push_back(&event);
    first = std::min(first, event.startNs());
    last = std::max(last, event.endNs());
  }
  return {.seconds = last > first ? static_cast<double>(last - first) / 1e9 : 0,
          .operations = rows_of(std::move(threads)),
          .kernels = rows_of(std::move(streams))};
}

double measured_matmul_flops(at::ScalarType dtype, at::Device device) {
  const int64_t n = device.is_cuda() ? 8192 : 1024;
  const at::Tensor a = at::empty({n, n}, at::TensorOptions(device).dtype(dtype)).normal_(), out = at::empty_like(a);
  double best = 1e9;
  for (int i = 0; i < 6; ++i) {
    synchronize(device);
    const auto start = std::chrono::steady_clock::now();
    matrix_product_into(a, a.t(), out);
    synchronize(device);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return 2.0 * static_cast<double>(n * n * n) / best;
}

std::string profile_table(const Profile& profile, int64_t num_steps) {
  std::string text = table_of(profile.operations, "operation", num_steps);
  if (!profile.kernels.empty()) text = table_of(profile.kernels, "on the GPU", num_steps) + "\n" + text;
  return text;
}

}  // namespace caldera
