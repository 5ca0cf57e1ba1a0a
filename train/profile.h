// Where the time of a run's steps goes: a Chrome trace, and a table by operation.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace caldera {

struct ProfileRow {
  std::string name;
  int64_t count = 0;
  double self_ms = 0, total_ms = 0;  // without and with what it calls
};

struct Profile {
  double seconds = 0;
  std::vector<ProfileRow> operations;  // on the host's threads, most self time first
  std::vector<ProfileRow> kernels;     // on the GPU, copies too, likewise; those of a stream run one after the other
};

// Records all operations of the process, on CPU and GPU, from construction to stop(). One at a time.
class Profiler {
 public:
  Profiler();
  ~Profiler();
  Profiler(const Profiler&) = delete;
  Profiler& operator=(const Profiler&) = delete;
  // Writes the trace (open it in chrome://tracing or ui.perfetto.dev) and adds up. Call it once, on the
  // thread that made the profiler.
  Profile stop(const std::filesystem::path& trace);

 private:
  bool running_ = false;
};

// The table, for people: a line an operation, most time first, what makes up less than half a percent left
// out.
std::string profile_table(const Profile& profile, int64_t num_steps);

// Operations a second that matrix products reach on this device now, best of a few: of 1024 x 1024 on a CPU, of 8192 x
// 8192 on a GPU.
double measured_matmul_flops(at::ScalarType dtype, at::Device device);

}  // namespace caldera
