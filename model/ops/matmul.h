// Matrix products on the fastest library at hand (product_way.h). Which way is taken depends on the machine
// and the shapes alone, never on timing, so a resumed run computes the same bits.
#pragma once
#include "base/aten.h"
#include "model/ops/product_way.h"

namespace caldera {

// a [M, K] times b [K, N], or both with a batch dimension in front; float32 or bfloat16, b and a may be
// transposed views. No gradients. `in_float8`: float8_product (float8.h).
at::Tensor matrix_product(const at::Tensor& a, const at::Tensor& b, bool in_float8 = false);
// The same into `out`, dense, without packed copies of frozen weights (frozen_weights.h); with `accumulate` added to it.
void matrix_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out,
                         bool accumulate = false);

// x [..., I] times weight [O, I] transposed, plus bias [O] where it is defined: at::linear, differentiable.
// For backward x is kept only if the weight wants a gradient. Without `needs_value` the product is not computed: the
// result has its graph, and numbers of no meaning (see recompute() in ops.h). `in_float8`: this product and those of its gradients are float8_products.
at::Tensor affine(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {},
                  bool needs_value = true, bool in_float8 = false);

// A weight [O, I] in 8 bits: values times one float32 scale a row, the largest magnitude of which is 127 (as
// LLM.int8's row-wise absmax, arXiv 2208.07339, without its outliers). For generation alone.
struct Int8Weight {
  at::Tensor values_OI, scale_O;
  at::Tensor sum_O;  // of a row's values, int32
};
Int8Weight quantize_int8(const at::Tensor& weight_OI);
// x [N, I] -> [N, O] in x's dtype. Few rows are rounded to 16 bits a value where the processor multiplies
// whole numbers faster (short_rows.h); otherwise sums are in float32. No gradients.
at::Tensor affine_int8(const at::Tensor& x_NI, const Int8Weight& weight, const at::Tensor& bias_O = {});

// For few rows: the weight is read once, sums in float32, each row as if it were alone.
at::Tensor affine_few_rows(const at::Tensor& x_NI, const at::Tensor& weight_OI,
                           const at::Tensor& bias_O = {});

// While one of these lives, affine() takes that way for up to four rows on a CPU. Generation holds one;
// elsewhere the same rows must give the same bits with a graph and without (recomputation).
class FewRowsGuard {
 public:
  FewRowsGuard();
  ~FewRowsGuard();
  FewRowsGuard(const FewRowsGuard&) = delete;
  FewRowsGuard& operator=(const FewRowsGuard&) = delete;
  static bool active();

 private:
  bool before_;
};

}  // namespace caldera
