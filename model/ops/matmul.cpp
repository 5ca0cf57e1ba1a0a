#include "model/ops/matmul.h"

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/float8.h"
#include "model/ops/frozen_weights.h"
#include "model/ops/gemm.h"
#include "model/ops/widened_product.h"

namespace caldera {
namespace {

// Where a factor or the result is narrower than this, widening takes longer than it saves.
constexpr int64_t kLeastWidened = 64;

// How to multiply these.
ProductWay way_of(const at::Tensor& a, const at::Tensor& b) {
  if (!a.is_cpu() || b.scalar_type() != a.scalar_type() || a.numel() == 0 || b.numel() == 0) return ProductWay::kAten;
  const ProductWay way = product_way(a.scalar_type());
  if (way != ProductWay::kWidened) return way;
  const bool has_onednn = onednn_multiplies(a.scalar_type());  // slower, but for narrow products and batches
  if (a.dim() != 2) return has_onednn ? ProductWay::kOneDnn : ProductWay::kAten;
  const bool is_narrow = std::min({a.size(0), a.size(1), b.size(1)}) < kLeastWidened;
  return is_narrow && has_onednn ? ProductWay::kOneDnn : way;
}

// The product by a weight that lies ready in oneDNN's order, plus the bias where defined; undefined where it does not.
at::Tensor product_by_packed(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {}) {
  return way_of(a, b) == ProductWay::kOneDnn ? product_with_packed(a, b, bias) : at::Tensor();
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
  if (way_of(x, weight.t()) == ProductWay::kOwn && has_cpu_kernel(bias)) {
    CALDERA_PROFILED("matrix_product");
    const at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options().requires_grad(false));
    gemm::product_into(x, weight.t(), y, /*accumulate=*/false, bias);
    return at::_unsafe_view(y, shape);
  }
  if (const at::Tensor y = product_by_packed(x, weight.t(), bias); y.defined())
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

void matrix_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool accumulate) {
  CALDERA_ASSERT(a.dim() == b.dim() && (a.dim() == 2 || a.dim() == 3) && out.is_contiguous());
  CALDERA_PROFILED("matrix_product");
  const at::NoGradGuard no_grad;
  const ProductWay way = out.scalar_type() == a.scalar_type() ? way_of(a, b) : ProductWay::kAten;
  if (way == ProductWay::kOwn) return gemm::product_into(a, b, out, accumulate);
  if (way == ProductWay::kOneDnn) return onednn_product_into(a, b, out, accumulate);
  if (way == ProductWay::kWidened) return widened_product_into(a, widened_if_frozen(b), out, accumulate);
  at::Tensor result = out;
  if (a.dim() == 2)
    accumulate ? result.addmm_(a, b) : at::mm_out(result, a, b);
  else
    accumulate ? result.baddbmm_(a, b) : at::bmm_out(result, a, b);
}

at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b, bool in_float8) {
  if (in_float8) return float8_product(a, b);
  if (const at::Tensor y = product_by_packed(a, b); y.defined()) return y;
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
  return AffineFunction::apply(x, weight, given(bias), needs_value, in_float8);
}

}  // namespace caldera
