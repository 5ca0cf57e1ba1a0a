// bfloat16 products on CPUs that multiply float32 faster. The factors are widened, which is exact, multiplied in float32,
// and the sums rounded once: the numbers of any bfloat16 product with float32 sums.
#pragma once
#include "base/aten.h"

namespace caldera {

// out [M, N] = a [M, K] times b [K, N], with `accumulate` added to it. a and out bfloat16, out dense; b bfloat16, or
// widened already: the same bits. a and b may be transposed views.
void widened_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool accumulate = false);
// Bytes that it takes meanwhile, at most.
int64_t widened_product_bytes(int64_t M, int64_t K, int64_t N);

}  // namespace caldera
