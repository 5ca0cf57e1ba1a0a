#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/noise.h"
#include "model/ops/ops.h"

namespace caldera {
namespace {

using namespace simd;

template <class V, class T>
CALDERA_INLINE void drop(const T* x, T* y, int64_t begin, int64_t end, uint32_t threshold, float scale,
                         const NoiseWords& words) {
  for (int64_t i = begin; i < end; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, end - i);
    const V kept = load<V>(x + i, n) * scale;
    store(y + i, noise_lanes<V>(static_cast<uint32_t>(i), words) >= threshold ? kept : V{}, n);
  }
}

// x and y dense.
void drop_into(const at::Tensor& x, const at::Tensor& y, double p, uint64_t seed) {
  const NoiseWords words = noise_words(seed);
  const auto threshold = static_cast<uint32_t>(std::min(std::llround(p * 0x1p32), 0xFFFFFFFFll));
  const auto scale = static_cast<float>(1 / (1 - p));
  if (x.is_cuda()) {
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::dropout(cuda::in<T>(x), cuda::out<T>(y), x.numel(), threshold, scale, words, stream);
    });
    return;
  }
  with_cpu_type(x, [&]<class T>(T*) {
    const T* x_data = x.const_data_ptr<T>();
    T* y_data = y.mutable_data_ptr<T>();
    at::parallel_for(0, x.numel(), row_grain(1), [&](int64_t begin, int64_t end) {
      simd::run<CALDERA_EACH_WIDTH(drop, T)>(x_data, y_data, begin, end, threshold, scale, words);
    });
  });
}

}  // namespace

at::Tensor dropped_out(const at::Tensor& x, double p, uint64_t seed) {
  CALDERA_PROFILED("dropout");
  CALDERA_ASSERT(p >= 0 && p < 1);
  const at::NoGradGuard no_grad;
  if (p == 0) return x;
  if (!has_kernel(x)) return x * dropped_out(at::ones(x.sizes(), at::kFloat), p, seed).to(x.options());
  at::Tensor y = at::empty(x.sizes(), x.options().requires_grad(false));
  drop_into(x.contiguous(), y, p, seed);
  return y;
}

}  // namespace caldera
