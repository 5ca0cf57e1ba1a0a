// Matrix products of our own for x86 processors that have AVX2 and not AVX-512: LibTorch's libraries run them
// there at two thirds to four fifths of what the cores can do, narrow ones slower, and have nothing for
// bfloat16. Both factors are packed into blocks that stay in the caches (Goto and van de Geijn, "Anatomy of
// High-Performance Matrix Multiplication", 2008), and bfloat16 is widened on the way. Sums are in float32.
// The bits depend on the sizes and the factors alone, not on the number of threads, on how factors lie or on
// who packs them.
#pragma once
#include <cstdint>

#include "base/aten.h"
#include "model/ops/gemm_avx2.h"

namespace caldera::gemm {

// Whether this processor runs what follows.
bool is_there();

// c [M, N], float32 or bfloat16, its columns lying together.
struct Result {
  void* data = nullptr;
  bool is_half = false;
  int64_t row_stride = 0;
};

// c = a [M, K] times b [K, N], plus bias [N] where it has data, plus c with `accumulate`; rounded once. Of
// each factor one stride is 1, but for sides of length 1. On all threads.
void multiply(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, const Result& c,
              bool accumulate = false, const Matrix& bias = {});
// A right factor [K, N] packed once, for many products: the panels that multiply() would make, packed_size(K,
// N) floats.
constexpr int64_t packed_size(int64_t K, int64_t N) { return K * ((N + kPanel - 1) / kPanel * kPanel); }
void pack(int64_t N, int64_t K, const Matrix& b, float* panels);
void multiply_by_packed(int64_t M, int64_t N, int64_t K, const Matrix& a, const float* panels,
                        const Result& c, bool accumulate = false, const Matrix& bias = {});

// c [M, N] (+)= a times b on the calling thread, by factors that lie ready for tiles.
void multiply_ready(int64_t M, int64_t N, int64_t K, const Left& a, const Right& b, float* c,
                    int64_t c_stride, bool accumulate = false);

// The same of tensors a [M, K], b [K, N] and dense out [M, N], or all with a batch dimension in front:
// float32 or bfloat16, on the CPU; the factors' strides are any. bias [N] for two dimensions alone.
void product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool accumulate = false,
                  const at::Tensor& bias = {});
// By the panels of a right factor, as one tensor.
at::Tensor packed(const at::Tensor& b);
void product_by_packed_into(const at::Tensor& a, const at::Tensor& panels, const at::Tensor& out,
                            const at::Tensor& bias = {});

}  // namespace caldera::gemm
