#include <cmath>

#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {
namespace {

// exp(x - top); two equal infinities count as the same value.
__device__ inline float relative_exp(float x, float top) { return x == top ? 1.0f : expf(x - top); }

// A block takes a row: it reads it once for the sum (Milakov & Gimelshein, arXiv 1805.02867: each thread's
// sum is relative to the largest value that it has seen), and a second time where the gradient takes its
// place.
template <class T, int kN>
__global__ void cross_entropy_kernel(T* logits, const int64_t* targets, float* nll, int64_t vocab,
                                     bool gradient, float scale) {
  const int64_t row = blockIdx.x, target = targets[row];
  logits += row * vocab;
  const bool is_known = target >= 0 && target < vocab;
  // Read by all before anyone writes: the sums over the block stand between.
  const float at_target = is_known ? load<1>(logits + target)[0] : NAN;
  float top = -INFINITY, total = 0;
  CALDERA_UNROLL_4
  for (int64_t i = threadIdx.x * kN; i < vocab; i += kThreads * kN) {
    const Floats<kN> v = load<kN>(logits + i);
    float best = top;
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) best = fmaxf(best, v[k]);
    total *= relative_exp(top, best);
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) total += relative_exp(v[k], best);
    top = best;
  }
  const float row_top = over_block(top, Max());
  const float log_total =
      logf(over_block(total * relative_exp(top, row_top), Sum()));  // of exp(logit - row_top)
  const float row_nll = log_total + (row_top - at_target);
  if (threadIdx.x == 0) nll[row] = row_nll;
  if (!gradient) return;
  for (int64_t i = threadIdx.x * kN; i < vocab; i += kThreads * kN) {
    Floats<kN> v = load<kN>(logits + i);
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k)  // at the target p - 1, exact where p is almost 1
      v[k] = scale * (i + k == target ? expm1f(-row_nll) : expf(v[k] - row_top - log_total));
    store(logits + i, v);
  }
}

}  // namespace

template <class T>
void cross_entropy(T* logits, const int64_t* targets, float* nll, int64_t rows, int64_t vocab, bool gradient,
                   float scale, Stream stream) {
  with_lanes<T>(
      vocab,
      [&](auto lanes) {
        launch("cross_entropy", cross_entropy_kernel<T, lanes.value>, rows, stream, logits, targets, nll,
               vocab, gradient, scale);
      },
      logits);
}

template void cross_entropy(float*, const int64_t*, float*, int64_t, int64_t, bool, float, Stream);
template void cross_entropy(Bf16*, const int64_t*, float*, int64_t, int64_t, bool, float, Stream);

}  // namespace caldera::CALDERA_KERNELS
