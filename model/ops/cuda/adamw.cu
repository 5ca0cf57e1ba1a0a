#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {
namespace {

template <class T, int kN>
__global__ void adamw_kernel(float* master, float* exp_avg, float* exp_avg_sq, const T* gradient,
                             Bf16* weight, int64_t count, AdamWFactors f) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN;
  if (i >= count) return;
  Floats<kN> g = {};
  if (gradient) g = load<kN>(gradient + i);
  Floats<kN> m = load<kN>(exp_avg + i), v = load<kN>(exp_avg_sq + i), w = load<kN>(master + i);
  CALDERA_UNROLL
  for (int k = 0; k < kN; ++k) {
    const float scaled = g[k] * f.grad_scale;
    m[k] += f.one_minus_beta1 * (scaled - m[k]);
    v[k] = v[k] * f.beta2 + f.one_minus_beta2 * scaled * scaled;
    w[k] = w[k] * f.decay - f.step_size * m[k] / (sqrtf(v[k]) * f.inverse_correction2 + f.epsilon);
  }
  store(exp_avg + i, m);
  store(exp_avg_sq + i, v);
  store(master + i, w);
  if (weight) store(weight + i, w);
}

}  // namespace

template <class T>
void adamw(float* master, float* exp_avg, float* exp_avg_sq, const T* gradient, Bf16* weight, int64_t count,
           const AdamWFactors& factors, Stream stream) {
  with_lanes<float>(
      count,
      [&](auto lanes) {
        launch("adamw", adamw_kernel<T, lanes.value>, ceil_div(count, kThreads * lanes.value), stream, master,
               exp_avg, exp_avg_sq, gradient, weight, count, factors);
      },
      master, exp_avg, exp_avg_sq, gradient, weight);
}

template void adamw(float*, float*, float*, const float*, Bf16*, int64_t, const AdamWFactors&, Stream);
template void adamw(float*, float*, float*, const Bf16*, Bf16*, int64_t, const AdamWFactors&, Stream);

}  // namespace caldera::CALDERA_KERNELS
