#include "model/ops/cuda/launch.h"

#ifdef CALDERA_CUDA
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "base/error.h"

namespace caldera::cuda {

Stream current_stream(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }

int compute_capability(at::Device device) {
  int major = 0, minor = 0;
  check_launch("attributes", cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
  check_launch("attributes", cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
  return 10 * major + minor;
}

void check_launch(const char* kernel, int error) {
  CALDERA_CHECK(error == cudaSuccess, Error, "CUDA kernel {}: {}", kernel,
                cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace caldera::cuda
#endif
