#include "model/ops/accumulate.h"

#include <algorithm>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

constexpr int64_t kGrain = 1 << 16;  // elements below which a second thread is not worth it

CALDERA_SIMD void add(float* sum, const c10::BFloat16* part, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    store(sum + i, load(sum + i, n) + load(part + i, n), n);
  }
}

}  // namespace

void accumulate_(const at::Tensor& sum, const at::Tensor& part) {
  const at::NoGradGuard no_grad;
  CALDERA_ASSERT(sum.scalar_type() == at::kFloat && sum.is_contiguous() && sum.numel() == part.numel());
  if (!has_cpu_kernel(part) || part.scalar_type() != at::kBFloat16) {
    sum.add_(part.view_as(sum));
    return;
  }
  const at::Tensor dense = part.contiguous();
  float* sum_data = sum.mutable_data_ptr<float>();
  const c10::BFloat16* part_data = dense.const_data_ptr<c10::BFloat16>();
  at::parallel_for(0, sum.numel(), kGrain, [&](int64_t begin, int64_t end) {
    add(sum_data + begin, part_data + begin, end - begin);
  });
}

}  // namespace caldera
