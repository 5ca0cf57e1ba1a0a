// The one-pass update against ATen's fused kernel, whose numbers are torch.optim.AdamW(fused=True)'s.
#include "model/ops/adamw.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "tests/aten.h"
#include "tests/support.h"

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

// Under sanitizers and on 64-bit ARM the kernel is compiled without fused multiplication: terms as large as 0.5 are rounded
// once more.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(__aarch64__)
constexpr double kMomentBound = 3e-8;
#else
constexpr double kMomentBound = 1e-9;
#endif

TEST(AdamW, IsAtensFusedUpdate) {
  for (const int64_t count : {1, 15, 16, 1000, 200001}) {
    const State expected = fresh(count), got = copy(expected);
    const at::Tensor gradient = at::randn({count});
    reference(expected, gradient, kStep);
    adamw_update(Master::of(got.master), got.exp_avg, got.exp_avg_sq, gradient, kStep);
    EXPECT_TRUE(at::allclose(got.master, expected.master, 1e-6, 1e-7)) << count;
    EXPECT_TRUE(at::allclose(got.exp_avg, expected.exp_avg, 1e-6, kMomentBound)) << count;
    EXPECT_TRUE(at::allclose(got.exp_avg_sq, expected.exp_avg_sq, 1e-6, 1e-12)) << count;
  }
}

// A master of bfloat16 halves with these values.
Master split(const at::Tensor& values) {
  const Master master = Master::of(at::zeros(values.sizes(), at::kBFloat16));
  master.assign(values);
  return master;
}

TEST(AdamW, AMasterInTwoHalvesIsUpdatedAsAWholeOne) {
  for (const int64_t count : {1, 15, 16, 777, 200001}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const State whole = fresh(count), halves = copy(whole);
      const at::Tensor gradient = at::randn({count}).to(dtype), before = gradient.clone();
      const Master master = split(halves.master);
      for (int i = 0; i < 3; ++i) {
        adamw_update(Master::of(whole.master), whole.exp_avg, whole.exp_avg_sq, gradient, kStep);
        adamw_update(master, halves.exp_avg, halves.exp_avg_sq, gradient, kStep);
      }
      EXPECT_TRUE(at::equal(master.values(), whole.master)) << count;
      EXPECT_TRUE(at::equal(halves.exp_avg, whole.exp_avg) && at::equal(halves.exp_avg_sq, whole.exp_avg_sq)) << count;
      EXPECT_TRUE(is_nearest(master.weight, whole.master)) << count;
      EXPECT_TRUE(at::equal(gradient, before));
    }
  }
}

at::Tensor from_bits(const std::vector<int64_t>& bits) { return at::tensor(bits).to(at::kInt).view(at::kFloat); }

TEST(Master, ItsHalvesAreTheNearestBfloat16AndAllBits) {
  at::manual_seed(5);
  const at::Tensor any = at::randint(0, int64_t{1} << 32, {100003}).to(at::kInt).view(at::kFloat);
  const at::Tensor values = any.masked_select(any.isfinite());
  const Master master = split(values);
  EXPECT_TRUE(at::equal(master.values().view(at::kInt), values.view(at::kInt)));
  const at::Tensor nearest = values.to(at::kBFloat16), is_half_way = values.view(at::kInt).bitwise_and(0xFFFF).eq(0x8000);
  EXPECT_TRUE(at::equal(master.weight.masked_select(~is_half_way), nearest.masked_select(~is_half_way)));

  // Half way from 1 to the next, and from that to the one behind it, and their mirrors; the largest number, whose
  // nearest bfloat16 is infinite; zeros, the smallest number, infinities.
  const at::Tensor edges = from_bits({0x3F808000, 0x3F818000, 0xBF808000, 0xBF818000, 0x7F7FFFFF, 0, 0x80000000, 1,
                                      0x7F800000, 0xFF800000});
  const Master edge = split(edges);
  EXPECT_TRUE(at::equal(edge.values().view(at::kInt), edges.view(at::kInt)));
  EXPECT_TRUE(at::equal(edge.weight.to(at::kFloat).view(at::kInt),
                        from_bits({0x3F810000, 0x3F820000, 0xBF810000, 0xBF820000, 0x7F800000, 0, 0x80000000, 0,
                                   0x7F800000, 0xFF800000}).view(at::kInt)));
  const Master no_numbers = split(from_bits({0x7FFFFFFF, 0x7F800001, 0xFFFF8000}));
  EXPECT_TRUE(no_numbers.weight.isnan().all().item<bool>() && no_numbers.values().isnan().all().item<bool>());
}

TEST(Master, WithoutARemainderIsTheWeight) {
  const at::Tensor weight = at::rand({5});
  EXPECT_TRUE(Master::of(weight).values().is_same(weight));
  Master::of(weight).assign(at::ones({5}));
  EXPECT_TRUE(at::equal(weight, at::ones({5})));
}

TEST(AdamW, NoGradientCountsAsZeros) {
  const State expected = fresh(100), got = copy(expected);
  reference(expected, at::zeros({100}), kStep);
  adamw_update(Master::of(got.master), got.exp_avg, got.exp_avg_sq, at::Tensor(), kStep);
  EXPECT_TRUE(at::allclose(got.master, expected.master, 1e-6, 1e-7));
}

TEST(AdamW, TheNumberOfThreadsChangesNoBit) {
  const int threads = at::get_num_threads();
  const at::Tensor gradient = at::randn({300001});
  const State one = fresh(300001), two = copy(one);
  at::set_num_threads(1);
  adamw_update(Master::of(one.master), one.exp_avg, one.exp_avg_sq, gradient, kStep);
  at::set_num_threads(2);
  adamw_update(Master::of(two.master), two.exp_avg, two.exp_avg_sq, gradient, kStep);
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(one.master, two.master) && at::equal(one.exp_avg_sq, two.exp_avg_sq));
}

}  // namespace
}  // namespace caldera
