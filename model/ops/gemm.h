// Matrix products of our own for x86 processors that have AVX2 and not AVX-512: LibTorch's libraries run them
// there at two thirds to four fifths of what the cores can do, narrow ones slower, and have nothing for
// bfloat16. Both factors are packed into blocks that stay in the caches (Goto and van de Geijn, "Anatomy of
// High-Performance Matrix Multiplication", 2008), and bfloat16 is widened on the way. Sums are in float32.
// The bits depend on the sizes and the factors alone, not on the number of threads or on how factors lie.
#pragma once
#include <cstdint>

#include "base/aten.h"
#include "model/ops/gemm_avx2.h"

namespace caldera::gemm {

// c [M, N] (+)= a times b on the calling thread, by factors that lie ready for tiles.
void multiply_ready(int64_t M, int64_t N, int64_t K, const Left& a, const Right& b, float* c,
                    int64_t c_stride, bool accumulate = false);

// The product of tensors a [M, K] and b [K, N], plus bias [N] where defined, plus `out` with `accumulate`,
// into dense out [M, N]; or all but the bias with a batch dimension in front. On all threads, rounded once.
// float32 or bfloat16, on the CPU; the factors' strides are any.
void product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool accumulate = false,
                  const at::Tensor& bias = {});

// What products keep for the next: bytes of the calling thread, and the most that a process's threads keep
// together, whatever the sizes, beside 4 bytes for each element of a bias.
int64_t kept_bytes();
int64_t most_kept_bytes(int64_t num_threads);

}  // namespace caldera::gemm
