#include "model/ops/widened_product.h"

#include <algorithm>

#include "base/error.h"
#include "model/ops/matmul.h"

namespace caldera {
namespace {

constexpr int64_t kBlockElements = 1 << 21;  // of the result, or of a factor
constexpr int64_t kLeastWidth = 256;         // narrower products do not reach full speed
constexpr int64_t kDepth = 4096;             // of blocks of deep products

// The result is cut along its longer side, and the factor of the other side is widened whole; or, where that takes less
// memory, summed up from blocks of the factors' common dimension.
int64_t block_width(int64_t M, int64_t K, int64_t N) {
  const int64_t fewer = std::min(M, N), more = std::max(M, N);
  return std::clamp(kBlockElements / std::max<int64_t>({fewer, K, 1}), std::min(kLeastWidth, more), std::max<int64_t>(more, 1));
}
int64_t cut_elements(int64_t M, int64_t K, int64_t N) {
  const int64_t fewer = std::min(M, N);
  return fewer * K + block_width(M, K, N) * (K + fewer);
}
int64_t deep_elements(int64_t M, int64_t N) { return M * N + kDepth * (M + N); }
bool is_deep(int64_t M, int64_t K, int64_t N) { return K > kDepth && deep_elements(M, N) < cut_elements(M, K, N); }

at::Tensor sums_for(const at::Tensor& out, bool accumulate) {
  return accumulate ? out.to(at::kFloat).contiguous() : at::empty(out.sizes(), out.options().dtype(at::kFloat));
}

void multiply_block(const at::Tensor& a, const at::Tensor& b, at::Tensor out, bool accumulate) {
  const at::Tensor sums = sums_for(out, accumulate);
  matrix_product_into(a.to(at::kFloat), b.to(at::kFloat), sums, accumulate);
  out.copy_(sums);
}

}  // namespace

void widened_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool accumulate) {
  CALDERA_ASSERT(a.dim() == 2 && b.dim() == 2 && out.is_contiguous());
  const int64_t M = out.size(0), K = a.size(1), N = out.size(1);
  if (is_deep(M, K, N)) {
    const at::Tensor sums = sums_for(out, accumulate);
    for (int64_t begin = 0; begin < K; begin += kDepth) {
      const int64_t count = std::min(kDepth, K - begin);
      matrix_product_into(a.narrow(1, begin, count).to(at::kFloat), b.narrow(0, begin, count).to(at::kFloat), sums,
                          accumulate || begin > 0);
    }
    at::Tensor(out).copy_(sums);
    return;
  }
  const bool by_columns = N >= M;
  const at::Tensor whole = (by_columns ? a : b).to(at::kFloat);
  const int64_t width = block_width(M, K, N);
  for (int64_t begin = 0; begin < std::max(M, N); begin += width) {
    const int64_t count = std::min(width, std::max(M, N) - begin);
    if (by_columns)
      multiply_block(whole, b.narrow(1, begin, count), out.narrow(1, begin, count), accumulate);
    else
      multiply_block(a.narrow(0, begin, count), whole, out.narrow(0, begin, count), accumulate);
  }
}

int64_t widened_product_bytes(int64_t M, int64_t K, int64_t N) {
  return (is_deep(M, K, N) ? deep_elements(M, N) : cut_elements(M, K, N)) * int64_t{sizeof(float)};
}

}  // namespace caldera
