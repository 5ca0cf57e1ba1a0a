// The one-pass update against ATen's fused kernel, whose numbers are torch.optim.AdamW(fused=True)'s.
#include "model/ops/adamw.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

namespace caldera {
namespace {

struct State {
  at::Tensor master, exp_avg, exp_avg_sq;
};

State fresh(int64_t count) {
  at::manual_seed(3);
  return {at::randn({count}), at::randn({count}) * 0.01, at::rand({count}) * 1e-4};
}
State copy(const State& s) { return {s.master.clone(), s.exp_avg.clone(), s.exp_avg_sq.clone()}; }

void reference(const State& s, const at::Tensor& gradient, const AdamWStep& step) {
  const at::Tensor count = at::full({}, static_cast<double>(step.count));
  at::_fused_adamw_({s.master}, {gradient.to(at::kFloat) * step.grad_scale}, {s.exp_avg}, {s.exp_avg_sq}, {},
                    {count}, step.learning_rate, step.beta1, step.beta2, step.weight_decay, step.epsilon,
                    false, false);
}

constexpr AdamWStep kStep = {.learning_rate = 1e-2,
                             .beta1 = 0.9,
                             .beta2 = 0.98,
                             .epsilon = 1e-8,
                             .weight_decay = 0.1,
                             .grad_scale = 0.7,
                             .count = 5};

// Under sanitizers the kernel is compiled without fused multiplication: terms as large as 0.5 are rounded once more.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr double kMomentBound = 3e-8;
#else
constexpr double kMomentBound = 1e-9;
#endif

TEST(AdamW, IsAtensFusedUpdate) {
  for (const int64_t count : {1, 15, 16, 1000, 200001}) {
    const State expected = fresh(count), got = copy(expected);
    const at::Tensor gradient = at::randn({count});
    reference(expected, gradient, kStep);
    adamw_update(got.master, got.exp_avg, got.exp_avg_sq, gradient, got.master, kStep);
    EXPECT_TRUE(at::allclose(got.master, expected.master, 1e-6, 1e-7)) << count;
    EXPECT_TRUE(at::allclose(got.exp_avg, expected.exp_avg, 1e-6, kMomentBound)) << count;
    EXPECT_TRUE(at::allclose(got.exp_avg_sq, expected.exp_avg_sq, 1e-6, 1e-12)) << count;
  }
}

TEST(AdamW, RoundsTheMasterToABfloat16WeightAndTakesItsGradient) {
  const State expected = fresh(777), got = copy(expected);
  const at::Tensor gradient = at::randn({777}).to(at::kBFloat16), before = gradient.clone();
  const at::Tensor weight = at::zeros({777}, at::kBFloat16);
  reference(expected, gradient, kStep);
  adamw_update(got.master, got.exp_avg, got.exp_avg_sq, gradient, weight, kStep);
  EXPECT_TRUE(at::allclose(got.master, expected.master, 1e-6, 1e-7));
  EXPECT_TRUE(at::equal(weight, got.master.to(at::kBFloat16)));
  EXPECT_TRUE(at::equal(gradient, before));
}

TEST(AdamW, NoGradientCountsAsZeros) {
  const State expected = fresh(100), got = copy(expected);
  reference(expected, at::zeros({100}), kStep);
  adamw_update(got.master, got.exp_avg, got.exp_avg_sq, at::Tensor(), got.master, kStep);
  EXPECT_TRUE(at::allclose(got.master, expected.master, 1e-6, 1e-7));
}

TEST(AdamW, TheNumberOfThreadsChangesNoBit) {
  const int threads = at::get_num_threads();
  const at::Tensor gradient = at::randn({300001});
  const State one = fresh(300001), two = copy(one);
  at::set_num_threads(1);
  adamw_update(one.master, one.exp_avg, one.exp_avg_sq, gradient, one.master, kStep);
  at::set_num_threads(2);
  adamw_update(two.master, two.exp_avg, two.exp_avg_sq, gradient, two.master, kStep);
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(one.master, two.master) && at::equal(one.exp_avg_sq, two.exp_avg_sq));
}

}  // namespace
}  // namespace caldera
