// The formula of AdamW for the CPU kernels, 16 elements at a time.
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
CALDERA_INLINE simd::Vec adamw_lanes(const simd::Vec& w, simd::Vec& m, simd::Vec& v, const simd::Vec& g,
                                     const AdamWFactors& f) {
  m += f.one_minus_beta1 * (g - m);
  v = v * f.beta2 + f.one_minus_beta2 * g * g;
  const simd::Vec denominator = simd::sqrt(v) * f.inverse_correction2 + f.epsilon;
  return w * f.decay - f.step_size * m / denominator;
}

}  // namespace caldera
