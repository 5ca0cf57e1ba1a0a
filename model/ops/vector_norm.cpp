#include <cmath>
#include <numeric>

#include "model/ops/autograd.h"
#include "model/ops/ops.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

constexpr int64_t kRange = 1 << 14;  // elements whose squares are summed in float32

template <class V, class T>
CALDERA_INLINE float squares(const T* x, int64_t count) {
  V sums[2][2] = {};  // of additions that need not wait for each other
  int64_t i = 0;
  for (; i + 4 * kLanesOf<V> <= count; i += 4 * kLanesOf<V>) {
    for (int64_t k = 0; k < 2; ++k) {
      const Two<V> v = load_two<V>(x + i + k * 2 * kLanesOf<V>);
      sums[k][0] += v.first * v.first;
      sums[k][1] += v.second * v.second;
    }
  }
  for (; i < count; i += kLanesOf<V>) {
    const V v = load<V>(x + i, std::min(kLanesOf<V>, count - i));
    sums[0][0] += v * v;
  }
  return sum((sums[0][0] + sums[0][1]) + (sums[1][0] + sums[1][1]));
}

}  // namespace

at::Tensor vector_norm(const at::Tensor& x_in) {
  const at::NoGradGuard no_grad;
  if (x_in.scalar_type() == at::kDouble) return at::linalg_vector_norm(x_in, 2).to(at::kFloat);
  if (!has_cpu_kernel(x_in)) return at::linalg_vector_norm(x_in, 2, std::nullopt, false, at::kFloat);
  const at::Tensor x = x_in.contiguous();
  // The ranges are the same on any number of threads, and so is the sum.
  std::vector<double> parts(static_cast<size_t>((x.numel() + kRange - 1) / kRange));
  with_cpu_type(x, [&]<class T>(T*) {
    const T* data = x.const_data_ptr<T>();
    at::parallel_for(0, std::ssize(parts), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        parts[static_cast<size_t>(i)] = simd::run<CALDERA_EACH_WIDTH(squares, T)>(
            data + i * kRange, std::min(kRange, x.numel() - i * kRange));
    });
  });
  return at::scalar_tensor(std::sqrt(std::accumulate(parts.begin(), parts.end(), 0.0)), at::kFloat);
}

}  // namespace caldera
