#include "model/ops/matmul.h"

#include <ATen/Context.h>

#include <optional>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/float8.h"
#include "model/ops/frozen_weights.h"

namespace at::native {
// LibTorch exports it but ships no header: result = beta * result + alpha * a b, by oneDNN.
void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& result, float beta, float alpha);
}  // namespace at::native

namespace caldera {
namespace {

#ifdef __x86_64__
bool onednn_is_fastest(at::ScalarType dtype) {
  static const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // MKL picks its code by the maker's name.
  static const bool mkl_is_slow = !__builtin_cpu_is("intel") && __builtin_cpu_supports("avx2");
  if (dtype == at::kFloat) return mkl_is_slow;
  return dtype == at::kBFloat16 && has_avx512;
}
#else
bool onednn_is_fastest(at::ScalarType) { return false; }
#endif

bool takes_onednn(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out) {
  return a.device().is_cpu() && has_onednn_products(a.scalar_type()) &&
         b.scalar_type() == a.scalar_type() && out.scalar_type() == a.scalar_type() && a.numel() > 0 &&
         b.numel() > 0;
}

at::Tensor affine_forward(const at::Tensor& x_in, const at::Tensor& weight, const at::Tensor& bias,
                          bool needs_value, bool in_float8) {
  const at::Tensor x = x_in.reshape({-1, weight.size(1)});
  std::vector<int64_t> shape = x_in.sizes().vec();
  shape.back() = weight.size(0);
  if (!needs_value) return at::empty(shape, x.options().requires_grad(false));
  if (in_float8) {
    const at::Tensor y = float8_product(x, weight.t());
    return at::_unsafe_view(bias.defined() ? y.add_(bias) : y, shape);  // autograd refuses views of it
  }
  if (!bias.defined()) return at::_unsafe_view(matrix_product(x, weight.t()), shape);
  // The bias goes into the sum before it is rounded.
  if (const at::Tensor y = takes_onednn(x, weight, weight) ? product_with_frozen(x, weight.t(), bias) : at::Tensor();
      y.defined())
    return at::_unsafe_view(y, shape);
  const at::Tensor y = at::empty(shape, x.options().requires_grad(false));
  y.copy_(bias);  // of its own: for one row, expanded bias would be the bias itself
  matrix_product_into(x, weight.t(), y.view({x.size(0), weight.size(0)}), /*accumulate=*/true);
  return y;
}

struct AffineFunction : torch::autograd::Function<AffineFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, bool needs_value, bool in_float8) {
    ctx->saved_data["in_float8"] = in_float8;
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->save_for_backward({weight.requires_grad() ? x : at::Tensor(), weight});
    return affine_forward(x, weight, bias.value_or(at::Tensor()), needs_value, in_float8);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1];
    const at::Tensor dy = grads[0].reshape({-1, weight.size(0)});
    const bool in_float8 = ctx->saved_data["in_float8"].toBool();
    variable_list result(5);
    if (ctx->needs_input_grad(0)) {
      std::vector<int64_t> shape = grads[0].sizes().vec();
      shape.back() = weight.size(1);
      result[0] = matrix_product(dy, weight, in_float8).view(shape);
    }
    if (ctx->needs_input_grad(1)) result[1] = matrix_product(dy.t(), x.reshape({-1, weight.size(1)}), in_float8);
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2)) result[2] = dy.sum(0);
    return result;
  }
};

}  // namespace

bool has_onednn_products(at::ScalarType dtype) {
  static const bool has_onednn = at::hasMKLDNN();
  return has_onednn && onednn_is_fastest(dtype);
}

void matrix_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool accumulate) {
  CALDERA_ASSERT(a.dim() == b.dim() && (a.dim() == 2 || a.dim() == 3) && out.is_contiguous());
  CALDERA_PROFILED("matrix_product");
  const at::NoGradGuard no_grad;
  if (takes_onednn(a, b, out)) {
    at::native::mkldnn_matmul(a, b, out, accumulate ? 1.0f : 0.0f, 1.0f);
    return;
  }
  at::Tensor result = out;
  if (a.dim() == 2)
    accumulate ? result.addmm_(a, b) : at::mm_out(result, a, b);
  else
    accumulate ? result.baddbmm_(a, b) : at::bmm_out(result, a, b);
}

at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b, bool in_float8) {
  if (in_float8) return float8_product(a, b);
  if (const at::Tensor y = takes_onednn(a, b, b) ? product_with_frozen(a, b) : at::Tensor(); y.defined()) return y;
  std::vector<int64_t> shape = a.sizes().vec();
  shape.back() = b.size(-1);
  at::Tensor out = at::empty(shape, a.options().requires_grad(false));
  matrix_product_into(a, b, out);
  return out;
}

at::Tensor affine(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, bool needs_value,
                  bool in_float8) {
  if (needs_value && !in_float8 && (!has_cpu_kernel(x) || weight.scalar_type() != x.scalar_type()))
    return at::linear(x, weight, bias);
  if (FewRowsGuard::active() && x.dim() == 2 && x.size(0) <= 4 && weight.is_contiguous())
    return affine_few_rows(x, weight, bias);
  if (!wants_grad(x) && !wants_grad(weight) && !(bias.defined() && wants_grad(bias)))
    return affine_forward(x.detach(), weight, bias.defined() ? bias.detach() : bias, needs_value, in_float8);
  return AffineFunction::apply(x, weight, bias.defined() ? std::optional(bias) : std::nullopt, needs_value,
                               in_float8);
}

}  // namespace caldera
