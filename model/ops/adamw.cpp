#include "model/ops/adamw.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

constexpr int64_t kGrain = 1 << 16;  // elements below which a second thread is not worth it

struct Factors {
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction2, epsilon, grad_scale;
};

template <class G, class W>
CALDERA_INLINE void update_each(float* master, float* exp_avg, float* exp_avg_sq, const G* gradient,
                                W* weight, int64_t count, const Factors& f) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    const Vec g = gradient ? load(gradient + i, n) * f.grad_scale : Vec{};
    Vec m = load(exp_avg + i, n), v = load(exp_avg_sq + i, n);
    m += f.one_minus_beta1 * (g - m);
    v = v * f.beta2 + f.one_minus_beta2 * g * g;
    const Vec denominator = sqrt(v) * f.inverse_correction2 + f.epsilon;
    const Vec w = load(master + i, n) * f.decay - f.step_size * m / denominator;
    store(exp_avg + i, m, n);
    store(exp_avg_sq + i, v, n);
    store(master + i, w, n);
    if (weight) store(weight + i, w, n);
  }
}

// A null gradient counts as zeros; a null weight is not written.
CALDERA_SIMD void update(float* master, float* m, float* v, const float* gradient, c10::BFloat16* weight,
                         int64_t count, const Factors& factors) {
  update_each(master, m, v, gradient, weight, count, factors);
}
CALDERA_SIMD void update(float* master, float* m, float* v, const c10::BFloat16* gradient,
                         c10::BFloat16* weight, int64_t count, const Factors& factors) {
  update_each(master, m, v, gradient, weight, count, factors);
}

}  // namespace

void adamw_update(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                  const at::Tensor& gradient_in, const at::Tensor& weight, const AdamWStep& step) {
  CALDERA_ASSERT(exp_avg.numel() == master.numel() && exp_avg_sq.numel() == master.numel() &&
                 weight.numel() == master.numel());
  CALDERA_PROFILED("adamw_update");
  const bool in_place = weight.is_alias_of(master);
  if (!has_cpu_kernel(weight) || (gradient_in.defined() && !has_cpu_kernel(gradient_in))) {
    const at::Tensor gradient =
        gradient_in.defined() ? gradient_in.to(at::kFloat).view_as(master) : at::zeros_like(master);
    const auto scalar = [&](double value) { return at::full({}, value, master.options()); };
    at::_fused_adamw_({master}, {gradient}, {exp_avg}, {exp_avg_sq}, {},
                      {scalar(static_cast<double>(step.count))}, step.learning_rate, step.beta1, step.beta2,
                      step.weight_decay, step.epsilon,
                      /*amsgrad=*/false, /*maximize=*/false,
                      step.grad_scale == 1 ? std::nullopt : std::optional(scalar(1 / step.grad_scale)),
                      /*found_inf=*/std::nullopt);
    if (!in_place) weight.copy_(master);
    return;
  }
  const auto count = static_cast<double>(step.count);
  const Factors factors = {
      .decay = static_cast<float>(1 - step.learning_rate * step.weight_decay),
      .one_minus_beta1 = static_cast<float>(1 - step.beta1),
      .beta2 = static_cast<float>(step.beta2),
      .one_minus_beta2 = static_cast<float>(1 - step.beta2),
      .step_size = static_cast<float>(step.learning_rate / (1 - std::pow(step.beta1, count))),
      .inverse_correction2 = static_cast<float>(1 / std::sqrt(1 - std::pow(step.beta2, count))),
      .epsilon = static_cast<float>(step.epsilon),
      .grad_scale = static_cast<float>(step.grad_scale)};
  const at::Tensor gradient = gradient_in.defined() ? gradient_in.contiguous() : gradient_in;
  CALDERA_ASSERT(!gradient.defined() || gradient.numel() == master.numel());
  float* master_data = master.mutable_data_ptr<float>();
  float *m = exp_avg.mutable_data_ptr<float>(), *v = exp_avg_sq.mutable_data_ptr<float>();
  c10::BFloat16* weight_data = in_place ? nullptr : weight.mutable_data_ptr<c10::BFloat16>();
  const auto run = [&]<class G>(const G* g) {
    at::parallel_for(0, master.numel(), kGrain, [&](int64_t begin, int64_t end) {
      update(master_data + begin, m + begin, v + begin, g ? g + begin : nullptr,
             weight_data ? weight_data + begin : nullptr, end - begin, factors);
    });
  };
  if (!gradient.defined())
    run(static_cast<const float*>(nullptr));
  else if (gradient.scalar_type() == at::kFloat)
    run(gradient.const_data_ptr<float>());
  else
    run(gradient.const_data_ptr<c10::BFloat16>());
}

}  // namespace caldera
