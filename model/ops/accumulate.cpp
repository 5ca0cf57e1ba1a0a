#include "model/ops/accumulate.h"

#include <algorithm>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

template <class V>
CALDERA_INLINE void add(float* sum, const c10::BFloat16* part, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, count - i);
    store(sum + i, load<V>(sum + i, n) + load<V>(part + i, n), n);
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
  at::parallel_for(0, sum.numel(), kGrainElements, [&](int64_t begin, int64_t end) {
    simd::run<CALDERA_EACH_WIDTH(add)>(sum_data + begin, part_data + begin, end - begin);
  });
}

}  // namespace caldera
