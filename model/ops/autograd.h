// What the operations' autograd functions share.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>

#include "base/aten.h"

namespace caldera {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Names the rest of the scope in profiles (caldera train --profile); costs nothing otherwise.
#define CALDERA_PROFILED(name) RECORD_FUNCTION("caldera::" name, c10::ArrayRef<const c10::IValue>{})

// Whether the hand-written CPU kernels take this tensor; everything else goes through plain ATen.
inline bool has_cpu_kernel(const at::Tensor& x) {
  return x.device().is_cpu() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16);
}
// An argument of Function::apply(), which takes no undefined tensors.
inline std::optional<at::Tensor> given(const at::Tensor& x) { return x.defined() ? std::optional(x) : std::nullopt; }
inline bool wants_grad(const at::Tensor& x) { return at::GradMode::is_enabled() && x.requires_grad(); }

// Calls f with a null pointer of the element type, float or c10::BFloat16.
template <class Function>
void with_cpu_type(at::ScalarType dtype, Function f) {
  if (dtype == at::kFloat)
    f(static_cast<float*>(nullptr));
  else
    f(static_cast<c10::BFloat16*>(nullptr));
}
template <class Function>
void with_cpu_type(const at::Tensor& x, Function f) {
  with_cpu_type(x.scalar_type(), f);
}

inline constexpr int64_t kGrainElements = 1 << 16;  // below which a second thread is not worth it
// Rows of this width below which work is not worth a second thread.
inline int64_t row_grain(int64_t width) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width)); }

}  // namespace caldera
