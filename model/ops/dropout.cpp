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

// One row.
template <class V, class T>
CALDERA_INLINE void drop(const T* x, T* y, int64_t width, uint32_t threshold, float scale,
                         const NoiseWords& words) {
  for (int64_t i = 0; i < width; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, width - i);
    const V kept = load<V>(x + i, n) * scale;
    store(y + i, noise_lanes<V>(static_cast<uint32_t>(i), words) >= threshold ? kept : V{}, n);
  }
}

// x, y and keys dense.
void drop_into(const at::Tensor& x, const at::Tensor& y, const Dropout& dropout, uint64_t seed) {
  const int64_t width = x.size(1);
  const auto threshold = static_cast<uint32_t>(std::min(std::llround(dropout.p * 0x1p32), 0xFFFFFFFFll));
  const auto scale = static_cast<float>(1 / (1 - dropout.p));
  const int64_t* keys = dropout.keys_T.const_data_ptr<int64_t>();
  if (x.is_cuda()) {
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::dropout(cuda::in<T>(x), cuda::out<T>(y), keys, seed, x.size(0), width, threshold, scale, stream);
    });
    return;
  }
  with_cpu_type(x, [&]<class T>(T*) {
    const T* x_data = x.const_data_ptr<T>();
    T* y_data = y.mutable_data_ptr<T>();
    at::parallel_for(0, x.size(0), row_grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        simd::run<CALDERA_EACH_WIDTH(drop, T)>(x_data + t * width, y_data + t * width, width, threshold,
                                               scale, noise_words(static_cast<uint64_t>(keys[t]) ^ seed));
    });
  });
}

}  // namespace

at::Tensor dropped_out(const at::Tensor& x, const Dropout& dropout, uint64_t seed) {
  CALDERA_PROFILED("dropout");
  CALDERA_ASSERT(dropout.p >= 0 && dropout.p < 1);
  const at::NoGradGuard no_grad;
  if (dropout.p == 0) return x;
  CALDERA_ASSERT(x.dim() == 2 && dropout.keys_T.numel() == x.size(0) && dropout.keys_T.is_contiguous());
  if (!has_kernel(x)) {
    const Dropout on_cpu{dropout.p, dropout.keys_T.cpu()};
    return x * dropped_out(at::ones(x.sizes(), at::kFloat), on_cpu, seed).to(x.options());
  }
  at::Tensor y = at::empty(x.sizes(), x.options().requires_grad(false));
  drop_into(x.contiguous(), y, dropout, seed);
  return y;
}

}  // namespace caldera
