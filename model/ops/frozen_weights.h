// Weights that stay as they are keep what products make of them. oneDNN's read a weight in an order of their own, and
// lay it out anew at each product: a twentieth to a seventh of the product's time (measured on AMD EPYCs of families 25
// and 26, widths of 256 to 1376, some 1400 rows). Widened ones (widened_product.h) read it in float32. Our
// own (gemm.h) packs it again each time, in 5 % of the time of 256 rows and 2 % of 1400, and keeps nothing.
#pragma once

#include <cstdint>
#include <vector>

#include "base/aten.h"

namespace caldera {

// While one of these lives, products by one of `weights` (matrix [O, I], float32 or bfloat16, on the CPU) or by its
// transposed view read a copy, made at the first such product. Of each weight that is used both ways, forward and for the
// gradient of its input, there are two copies in oneDNN's order; a widened one serves both. A weight that was changed in
// place since is copied anew. The products' bits are those without.
class FrozenWeights {
 public:
  // What is listed twice counts once.
  explicit FrozenWeights(const std::vector<at::Tensor>& weights);
  ~FrozenWeights();
  FrozenWeights(const FrozenWeights&) = delete;
  FrozenWeights& operator=(const FrozenWeights&) = delete;

  // Bytes of the copies that stand so far.
  int64_t num_bytes() const;

 private:
  std::vector<const void*> addresses_;
};

// Bytes of the copies for each element of such a weight; `forward_only`: it is used one way. 0 where this CPU's
// products read weights as they are.
int64_t frozen_bytes_each(at::ScalarType dtype, bool forward_only);

// b [K, N] in float32, where it is such a weight or its transposed view and this CPU multiplies in float32; else b itself.
at::Tensor widened_if_frozen(const at::Tensor& b);
// a [M, K] times b, plus bias [N] where defined, where b is such a weight and lies in oneDNN's order; else undefined.
at::Tensor product_with_packed(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {});

}  // namespace caldera
