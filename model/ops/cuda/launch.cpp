#include "model/ops/cuda/launch.h"

#ifdef CALDERA_CUDA
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include "base/error.h"

namespace caldera::cuda {

Stream current_stream(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }

void check_launch(const char* kernel, int error) {
  CALDERA_CHECK(error == cudaSuccess, Error, "CUDA kernel {}: {}", kernel,
                cudaGetErrorString(static_cast<cudaError_t>(error)));
}

}  // namespace caldera::cuda
#endif
