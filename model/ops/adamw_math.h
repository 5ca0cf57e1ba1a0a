// The formula of AdamW for the CPU kernels, 16 elements at a time.
#pragma once
#include <cmath>
#include <cstring>

#include "model/ops/adamw.h"
#include "model/ops/simd.h"

namespace caldera {

// A step's numbers as the kernels use them.
struct AdamWFactors {
  explicit AdamWFactors(const AdamWStep& step)
      : decay(static_cast<float>(1 - step.learning_rate * step.weight_decay)),
        one_minus_beta1(static_cast<float>(1 - step.beta1)),
        beta2(static_cast<float>(step.beta2)),
        one_minus_beta2(static_cast<float>(1 - step.beta2)),
        step_size(static_cast<float>(step.learning_rate /
                                     (1 - std::pow(step.beta1, static_cast<double>(step.count))))),
        inverse_correction2(
            static_cast<float>(1 / std::sqrt(1 - std::pow(step.beta2, static_cast<double>(step.count))))),
        epsilon(static_cast<float>(step.epsilon)),
        grad_scale(static_cast<float>(step.grad_scale)) {}
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction2, epsilon, grad_scale;
};

// Updates both moments by the gradient (already scaled) and returns the new weight.
CALDERA_INLINE simd::Vec adamw_lanes(const simd::Vec& w, simd::Vec& m, simd::Vec& v, const simd::Vec& g,
                                     const AdamWFactors& f) {
  m += f.one_minus_beta1 * (g - m);
  v = v * f.beta2 + f.one_minus_beta2 * g * g;
  const simd::Vec denominator = simd::sqrt(v) * f.inverse_correction2 + f.epsilon;
  return w * f.decay - f.step_size * m / denominator;
}

// Masters (adamw.h) where the kernels read and write them.
struct WholeWeights {
  float* weight;
  CALDERA_INLINE simd::Vec load(int64_t i, int64_t n) const { return simd::load(weight + i, n); }
  CALDERA_INLINE void store(int64_t i, const simd::Vec& values, int64_t n) const { simd::store(weight + i, values, n); }
};
struct SplitWeights {
  c10::BFloat16* weight;
  int16_t* remainder;
  CALDERA_INLINE simd::Vec load(int64_t i, int64_t n) const {
    simd::Shorts low = {};
    if (n == simd::kLanes)
      std::memcpy(&low, remainder + i, sizeof low);
    else
      for (int64_t lane = 0; lane < n; ++lane) low[lane] = remainder[i + lane];
    const simd::Bits high = reinterpret_cast<simd::Bits>(simd::load(weight + i, n));
    return reinterpret_cast<simd::Vec>(high + reinterpret_cast<simd::Bits>(__builtin_convertvector(low, simd::Ints)));
  }
  CALDERA_INLINE void store(int64_t i, const simd::Vec& values, int64_t n) const {
    const simd::Bits bits = reinterpret_cast<simd::Bits>(values);
    const simd::Bits is_nan = reinterpret_cast<simd::Bits>(values != values);
    const simd::Bits rounded = (((bits + 0x8000u) >> 16) & ~is_nan) | (0x7FC0u & is_nan);
    const simd::HalfBits high = __builtin_convertvector(rounded, simd::HalfBits);
    const simd::HalfBits low = __builtin_convertvector(bits & 0xFFFFu, simd::HalfBits);
    if (n == simd::kLanes) {
      std::memcpy(weight + i, &high, sizeof high);
      std::memcpy(remainder + i, &low, sizeof low);
    } else {
      for (int64_t lane = 0; lane < n; ++lane) {
        weight[i + lane].x = high[lane];
        remainder[i + lane] = static_cast<int16_t>(low[lane]);
      }
    }
  }
};

}  // namespace caldera
