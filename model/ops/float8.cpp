#include "model/ops/float8.h"

#include <fmt/format.h>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/matmul.h"

namespace caldera {
namespace {

constexpr double kLargest = 448, kEpsilon = 1e-12;
constexpr int64_t kMultiple = 16;  // of what the tensor cores take at a time

// x with columns of zeros behind it.
at::Tensor filled_up(const at::Tensor& x_NK) {
  const int64_t rest = x_NK.size(1) % kMultiple;
  return rest == 0 ? x_NK : at::constant_pad_nd(x_NK, {0, kMultiple - rest});
}

at::Tensor restored(const Float8Rows& rows) {
  return (rows.values_NK.to(at::kFloat) * rows.scale_N1).to(at::kBFloat16);
}

}  // namespace

Float8Rows quantize_float8(const at::Tensor& x_NK) {
  const at::Tensor largest = x_NK.abs().amax(1, /*keepdim=*/true).to(at::kDouble).clamp_min(kEpsilon);
  const at::Tensor factor = at::exp2(at::floor(at::log2((kLargest / largest).to(at::kFloat))));
  const at::Tensor values = x_NK.to(at::kFloat).mul_(factor).clamp_(-kLargest, kLargest);
  return {values.to(at::kFloat8_e4m3fn).contiguous(), at::reciprocal(factor).contiguous()};
}

at::Tensor float8_product(const at::Tensor& a_MK, const at::Tensor& b_KN) {
  CALDERA_ASSERT(a_MK.scalar_type() == at::kBFloat16 && b_KN.scalar_type() == at::kBFloat16);
  CALDERA_ASSERT(b_KN.size(1) % kMultiple == 0);
  CALDERA_PROFILED("float8_product");
  const at::NoGradGuard no_grad;
  const Float8Rows a = quantize_float8(filled_up(a_MK)), b = quantize_float8(filled_up(b_KN.t()));
  if (!a_MK.is_cuda()) return matrix_product(restored(a), restored(b).t());
  return at::_scaled_mm(a.values_NK, b.values_NK.t(), a.scale_N1, b.scale_N1.t(), /*bias=*/{},
                        /*scale_result=*/{}, at::kBFloat16, /*use_fast_accum=*/true);
}

std::string float8_fault(int capability) {
  if (capability >= 89) return "";
  return fmt::format(
      "float8: true needs a GPU whose tensor cores multiply 8-bit floats (compute capability 8.9 or more: "
      "Ada, Hopper); "
      "this one has {}.{}",
      capability / 10, capability % 10);
}

void check_float8([[maybe_unused]] at::Device device) {
  if constexpr (kHasCuda) {
    if (!device.is_cuda()) return;
    const std::string fault = float8_fault(cuda::compute_capability(device));
    CALDERA_CHECK(fault.empty(), ConfigError, "{}", fault);
  }
}

}  // namespace caldera
