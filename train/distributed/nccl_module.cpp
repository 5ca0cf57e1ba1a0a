// Built as a library of its own, libcaldera_nccl.so, which world.cpp opens where several ranks have GPUs: NCCL's groups
// come with all of CUDA's libraries, and a program that runs on a CPU is smaller and starts sooner without those.
#define USE_C10D_NCCL 1
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "train/distributed/nccl_module.h"

void caldera_make_nccl_group(const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, at::Device device,
                             std::chrono::milliseconds timeout, c10::intrusive_ptr<c10d::Backend>& group) {
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  group = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, options);
  group->setBoundDeviceId(device);
}
