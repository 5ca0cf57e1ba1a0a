#include "model/ops/adamw.h"

#include <algorithm>

#include "base/error.h"
#include "model/ops/adamw_math.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"

namespace caldera {
namespace {

using namespace simd;

constexpr int64_t kGrain = 1 << 16;  // elements below which a second thread is not worth it

template <class G, class W>
CALDERA_INLINE void update_each(float* master, float* exp_avg, float* exp_avg_sq, const G* gradient,
                                W* weight, int64_t count, const AdamWFactors& f) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    const Vec g = gradient ? load(gradient + i, n) * f.grad_scale : Vec{};
    Vec m = load(exp_avg + i, n), v = load(exp_avg_sq + i, n);
    const Vec w = adamw_lanes(load(master + i, n), m, v, g, f);
    store(exp_avg + i, m, n);
    store(exp_avg_sq + i, v, n);
    store(master + i, w, n);
    if (weight) store(weight + i, w, n);
  }
}

// A null gradient counts as zeros; a null weight is not written.
CALDERA_SIMD void update(float* master, float* m, float* v, const float* gradient, c10::BFloat16* weight,
                         int64_t count, const AdamWFactors& factors) {
  update_each(master, m, v, gradient, weight, count, factors);
}
CALDERA_SIMD void update(float* master, float* m, float* v, const c10::BFloat16* gradient,
                         c10::BFloat16* weight, int64_t count, const AdamWFactors& factors) {
  update_each(master, m, v, gradient, weight, count, factors);
}

}  // namespace

void adamw_update(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                  const at::Tensor& gradient_in, const at::Tensor& weight, const AdamWStep& step) {
  CALDERA_ASSERT(exp_avg.numel() == master.numel() && exp_avg_sq.numel() == master.numel() &&
                 weight.numel() == master.numel());
  CALDERA_PROFILED("adamw_update");
  const bool in_place = weight.is_alias_of(master);
  const AdamWFactors factors(step);
  const at::Tensor gradient = gradient_in.defined() ? gradient_in.contiguous() : gradient_in;
  CALDERA_ASSERT(!gradient.defined() || gradient.numel() == master.numel());
  if (master.is_cuda()) {
    cuda::with_type(gradient.defined() ? gradient : master, [&]<class T>(T*, cuda::Stream stream) {
      cuda::adamw(cuda::out<float>(master), cuda::out<float>(exp_avg), cuda::out<float>(exp_avg_sq),
                  cuda::in<T>(gradient), in_place ? nullptr : cuda::out<cuda::Bf16>(weight), master.numel(),
                  {factors.decay, factors.one_minus_beta1, factors.beta2, factors.one_minus_beta2,
                   factors.step_size, factors.inverse_correction2, factors.epsilon, factors.grad_scale},
                  stream);
    });
    return;
  }
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
