#include "model/ops/adamw.h"

#include <algorithm>

#include "base/error.h"
#include "model/ops/adamw_math.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"

namespace caldera {
namespace {

using namespace simd;

// The whole tensors; of the gradient one form, or none where it counts as zeros.
struct Arrays {
  float *exp_avg, *exp_avg_sq;
  const float* gradient = nullptr;
  const c10::BFloat16* gradient_bf16 = nullptr;
};

template <class V, class Weights, class G>
CALDERA_INLINE void update_each(const Weights& weights, const Arrays& a, const G* gradient, int64_t begin, int64_t end,
                                const AdamWFactors& f) {
  for (int64_t i = begin; i < end; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, end - i);
    const V g = gradient ? load<V>(gradient + i, n) * f.grad_scale : V{};
    V m = load<V>(a.exp_avg + i, n), v = load<V>(a.exp_avg_sq + i, n);
    store(weights, i, adamw_lanes(load<V>(weights, i, n), m, v, g, f), n);
    store(a.exp_avg + i, m, n);
    store(a.exp_avg_sq + i, v, n);
  }
}

template <class V, class Weights>
CALDERA_INLINE void update(const Weights& weights, const Arrays& a, int64_t begin, int64_t end,
                           const AdamWFactors& f) {
  if (a.gradient_bf16)
    update_each<V>(weights, a, a.gradient_bf16, begin, end, f);
  else
    update_each<V>(weights, a, a.gradient, begin, end, f);
}
template <class V, class From, class To>
CALDERA_INLINE void convert(const From& from, const To& to, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, end - i);
    store(to, i, load<V>(from, i, n), n);
  }
}

template <class From, class To>
void convert_all(const From& from, const To& to, int64_t count) {
  at::parallel_for(0, count, kGrainElements, [&](int64_t begin, int64_t end) {
    simd::run<CALDERA_EACH_WIDTH(convert, From, To)>(from, to, begin, end);
  });
}
SplitWeights halves_of(const at::Tensor& weight, const at::Tensor& remainder) {
  return {weight.mutable_data_ptr<c10::BFloat16>(), remainder.mutable_data_ptr<int16_t>()};
}

}  // namespace

Master Master::of(const at::Tensor& weight) {
  if (weight.scalar_type() != at::kBFloat16) return {weight, {}};
  return {weight, at::zeros(weight.sizes(), weight.options().dtype(at::kShort).requires_grad(false))};
}

at::Tensor Master::values() const {
  if (!remainder.defined()) return weight;
  const at::NoGradGuard no_grad;
  at::Tensor whole = at::empty(weight.sizes(), at::kFloat);
  convert_all(halves_of(weight.cpu(), remainder.cpu()), WholeWeights{whole.mutable_data_ptr<float>()}, weight.numel());
  return whole;
}

Master Master::rows(int64_t begin, int64_t count) const {
  return {weight.narrow(0, begin, count), remainder.defined() ? remainder.narrow(0, begin, count) : remainder};
}

void Master::assign(const at::Tensor& values) const {
  const at::NoGradGuard no_grad;
  if (!remainder.defined()) {
    weight.copy_(values);
    return;
  }
  const at::Tensor whole = values.to(at::kCPU, at::kFloat).contiguous(), weight_here = weight.cpu(),
                   remainder_here = remainder.cpu();  // themselves where they are in host memory
  convert_all(WholeWeights{whole.mutable_data_ptr<float>()}, halves_of(weight_here, remainder_here), weight.numel());
  if (!weight_here.is_same(weight)) {
    weight.copy_(weight_here);
    remainder.copy_(remainder_here);
  }
}

void adamw_update(const Master& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                  const at::Tensor& gradient_in, const AdamWStep& step) {
  CALDERA_PROFILED("adamw_update");
  const at::Tensor& weight = master.weight;
  const int64_t count = weight.numel();
  const bool is_whole = weight.scalar_type() == at::kFloat;
  CALDERA_ASSERT(exp_avg.numel() == count && exp_avg_sq.numel() == count &&
                 (is_whole || master.remainder.numel() == count));
  const AdamWFactors factors(step);
  const at::Tensor gradient = gradient_in.defined() ? gradient_in.contiguous() : gradient_in;
  CALDERA_ASSERT(!gradient.defined() || gradient.numel() == count);
  if (weight.is_cuda()) {
    cuda::with_type(gradient.defined() ? gradient : weight, [&]<class T>(T*, cuda::Stream stream) {
      cuda::adamw(cuda::weights_of(master), cuda::out<float>(exp_avg), cuda::out<float>(exp_avg_sq),
                  cuda::in<T>(gradient), count,
                  {factors.decay, factors.one_minus_beta1, factors.beta2, factors.one_minus_beta2,
                   factors.step_size, factors.inverse_correction2, factors.epsilon, factors.grad_scale},
                  stream);
    });
    return;
  }
  Arrays arrays{exp_avg.mutable_data_ptr<float>(), exp_avg_sq.mutable_data_ptr<float>()};
  if (gradient.defined() && gradient.scalar_type() == at::kFloat)
    arrays.gradient = gradient.const_data_ptr<float>();
  else if (gradient.defined())
    arrays.gradient_bf16 = gradient.const_data_ptr<c10::BFloat16>();
  const auto update_all = [&]<class Weights>(const Weights& weights) {
    at::parallel_for(0, count, kGrainElements, [&](int64_t begin, int64_t end) {
      simd::run<CALDERA_EACH_WIDTH(update, Weights)>(weights, arrays, begin, end, factors);
    });
  };
  if (is_whole)
    update_all(WholeWeights{weight.mutable_data_ptr<float>()});
  else
    update_all(halves_of(weight, master.remainder));
}

}  // namespace caldera
