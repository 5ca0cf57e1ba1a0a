// From tensors to the CUDA kernels. In a build without CUDA nothing of this is called, and the kernels are
// not there.
#pragma once
#include <c10/core/DeviceGuard.h>

#include <type_traits>

#include "base/aten.h"
#include "base/error.h"
#include "model/ops/adamw.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/kernels.h"

namespace caldera {

#ifdef CALDERA_CUDA
inline constexpr bool kHasCuda = true;
#else
inline constexpr bool kHasCuda = false;
#endif

// Whether the hand-written CUDA kernels take this tensor.
inline bool has_cuda_kernel(const at::Tensor& x) {
  return kHasCuda && x.is_cuda() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}

// Whether there is a kernel for it on its device; everything else goes through plain ATen.
inline bool has_kernel(const at::Tensor& x) { return has_cpu_kernel(x) || has_cuda_kernel(x); }

namespace cuda {

// The stream on which ATen works on that device at the moment.
Stream current_stream(at::Device device);
// Ten times the major number and the minor one: 90 for Hopper.
int compute_capability(at::Device device);

// Calls f(null pointer of x's element type, float or Bf16; stream) with x's device as the current one.
template <class Function>
void with_type(const at::Tensor& x, Function f) {
  if constexpr (kHasCuda) {
    const c10::DeviceGuard guard(x.device());
    const Stream stream = current_stream(x.device());
    if (x.scalar_type() == at::kFloat)
      f(static_cast<float*>(nullptr), stream);
    else
      f(static_cast<Bf16*>(nullptr), stream);
  }
}

// The data of a tensor of T (float or Bf16), null if it is not defined.
template <class T>
void check_type(const at::Tensor& x) {
  CALDERA_ASSERT(x.is_cuda() && x.scalar_type() == (std::is_same_v<T, float> ? at::kFloat : at::kBFloat16));
}
template <class T>
const T* in(const at::Tensor& x) {
  if (!x.defined()) return nullptr;
  check_type<T>(x);
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* out(const at::Tensor& x) {
  if (!x.defined()) return nullptr;
  check_type<T>(x);
  return static_cast<T*>(x.mutable_data_ptr());
}

inline Weights weights_of(const Master& master) {
  if (master.weight.scalar_type() == at::kFloat) return {.whole = out<float>(master.weight)};
  return {.weight = out<Bf16>(master.weight),
          .remainder = master.remainder.defined() ? master.remainder.mutable_data_ptr<int16_t>() : nullptr};
}

}  // namespace cuda
}  // namespace caldera
