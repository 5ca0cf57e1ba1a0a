// The formula of AdamW for the CPU kernels, a vector at a time.
#pragma once
#include <cmath>

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
template <simd::Vector V>
CALDERA_INLINE V adamw_lanes(const V& w, V& m, V& v, const V& g, const AdamWFactors& f) {
  m += f.one_minus_beta1 * (g - m);
  v = v * f.beta2 + f.one_minus_beta2 * g * g;
  const V denominator = simd::sqrt(v) * f.inverse_correction2 + f.epsilon;
  return w * f.decay - f.step_size * m / denominator;
}

// Masters (adamw.h) where the kernels read and write them: `n` elements from the i-th on.
struct WholeWeights {
  float* weight;
};
struct SplitWeights {
  c10::BFloat16* weight;
  int16_t* remainder;
};
template <simd::Vector V>
CALDERA_INLINE V load(const WholeWeights& from, int64_t i, int64_t n) {
  return simd::load<V>(from.weight + i, n);
}
template <simd::Vector V>
CALDERA_INLINE void store(const WholeWeights& to, int64_t i, const V& values, int64_t n) {
  simd::store(to.weight + i, values, n);
}
template <simd::Vector V>
CALDERA_INLINE V load(const SplitWeights& from, int64_t i, int64_t n) {
  using Bits = simd::BitsOf<V>;
  const auto high = reinterpret_cast<Bits>(simd::load<V>(from.weight + i, n));
  const auto low = simd::read_some<typename simd::TypesOf<V>::Shorts>(from.remainder + i, n);
  const auto wide = __builtin_convertvector(low, typename simd::TypesOf<V>::Ints);
  return reinterpret_cast<V>(high + reinterpret_cast<Bits>(wide));
}
template <simd::Vector V>
CALDERA_INLINE void store(const SplitWeights& to, int64_t i, const V& values, int64_t n) {
  using Bits = simd::BitsOf<V>;
  using HalfBits = typename simd::TypesOf<V>::HalfBits;
  const auto bits = reinterpret_cast<Bits>(values);
  const Bits rounded = values != values ? Bits{} + 0x7FC0u : (bits + 0x8000u) >> 16;
  simd::write_some(to.weight + i, __builtin_convertvector(rounded, HalfBits), n);
  simd::write_some(to.remainder + i, __builtin_convertvector(bits & 0xFFFFu, HalfBits), n);
}

}  // namespace caldera
