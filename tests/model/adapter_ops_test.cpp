// Dropout, adapters' products and the norm of gradients, against plain ATen in double.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "model/ops/ops.h"
#include "tests/aten.h"
#include "tests/model/operations.h"

namespace caldera {
namespace {

// The keys of rows: any numbers, neighbours among them.
at::Tensor row_keys(int64_t count, int64_t first = 0) { return at::arange(first, first + count, at::kLong); }

at::Tensor dropout_mask(const at::Tensor& keys, double p, uint64_t seed, int64_t width = 337) {
  return dropped_out(at::ones({keys.size(0), width}), {p, keys}, seed) != 0;
}

TEST(AdapterOps, DropoutIsTheSameEverywhere) {
  const at::Tensor x = random({300, 337}), keys = row_keys(300);
  const at::Tensor mask = dropout_mask(keys, 0.3, 5);
  EXPECT_NEAR(mask.to(at::kDouble).mean().item<double>(), 0.7, 0.005);
  EXPECT_FALSE(at::equal(mask, dropout_mask(keys, 0.3, 6)));
  // Neither a neighbour nor the row above tells anything.
  for (const int64_t dim : {0, 1}) {
    const at::Tensor both = mask.narrow(dim, 1, mask.size(dim) - 1) & mask.narrow(dim, 0, mask.size(dim) - 1);
    EXPECT_NEAR(both.to(at::kDouble).mean().item<double>(), 0.49, 0.008) << dim;
  }
  for (const at::DeviceType device : devices()) {
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
      const Dropout dropout{0.3, keys.to(device)};
      const at::Tensor here = x.to(device, dtype), got = dropped_out(here, dropout, 5);
      const at::Tensor expected = at::where(mask.to(device), here.to(at::kFloat) * (1 / 0.7f), 0.0f).to(dtype);
      EXPECT_TRUE(at::allclose(got, expected, 1e-6, 1e-6)) << dtype << " on " << device;
      EXPECT_TRUE(at::equal(dropped_out(here, {}, 5), here));
    }
  }
  EXPECT_TRUE(
      dropped_out(at::full({1, 64}, std::nan("")), {0.01, row_keys(1)}, 1).isnan().any().item<bool>());
}

TEST(AdapterOps, ARowsMaskGoesByItsKeyNotByItsPlace) {
  const at::Tensor keys = row_keys(50), order = (row_keys(50) * 7).remainder(50);
  const at::Tensor mask = dropout_mask(keys, 0.5, 5);
  EXPECT_TRUE(at::equal(dropout_mask(keys.index_select(0, order), 0.5, 5), mask.index_select(0, order)));
  EXPECT_TRUE(at::equal(dropout_mask(row_keys(20, 17), 0.5, 5), mask.narrow(0, 17, 20)));
  // Of a wider matrix the first columns are the same.
  EXPECT_TRUE(at::equal(dropout_mask(keys, 0.5, 5, 1024).narrow(1, 0, 337), mask));
}

// Two modules of three have adapters: y [T, 4 + 3 + 5], x [T, 6].
Tensors low_rank_inputs() {
  return {random({9, 12}), random({9, 6}), random({2, 6}), random({4, 2}), random({3, 6}), random({5, 3})};
}
std::vector<LowRankUpdate> low_rank_updates(const Tensors& t) { return {{t[2], t[3], 0, 17}, {t[4], t[5], 7, 18}}; }

TEST(AdapterOps, AddLowRank) {
  const Operation plain = [](const Tensors& t) {
    const auto update = [&](size_t i) { return t[1].mm(t[i].t()).mm(t[i + 1].t()) * 0.5; };
    return t[0] + at::cat({update(2), at::zeros({9, 3}, at::kDouble), update(4)}, 1);
  };
  const Operation fast = [](const Tensors& t) {
    return add_low_rank_(t[0].clone(), t[1], low_rank_updates(t), 0.5, /*dropout=*/{}, /*needs_value=*/true);
  };
  expect_same(fast, plain, low_rank_inputs());
  const Tensors inputs = low_rank_inputs();
  const at::NoGradGuard no_grad;
  EXPECT_LT(error(fast(inputs), plain(inputs)), 1e-12);
}

// For a given mask it is linear in x, so its gradient tells how far two results lie apart; without the result's value,
// the gradients are the same bits.
TEST(AdapterOps, AddLowRankDropsTheSameInBothPasses) {
  for (const at::DeviceType device : devices()) {
    Tensors t;
    for (const at::Tensor& input : low_rank_inputs()) t.push_back(input.to(device, at::kFloat));
    const at::Tensor other = random({9, 6}).to(device, at::kFloat), dy = random({9, 12}).to(device, at::kFloat);
    const Dropout dropout{0.4, row_keys(9).to(device)};
    const auto run = [&](const at::Tensor& x, bool needs_value) {
      return add_low_rank_(t[0].clone(), x, low_rank_updates(t), 2.0, dropout, needs_value);
    };
    const auto gradients = [&](bool needs_value) {
      Tensors leaves = {t[1].detach().requires_grad_(true)};
      for (size_t i = 2; i < t.size(); ++i) leaves.push_back(t[i].set_requires_grad(true));
      return torch::autograd::grad({run(leaves[0], needs_value)}, leaves, {dy});
    };
    const Tensors all = gradients(true), same = gradients(false);
    for (size_t i = 0; i < all.size(); ++i) EXPECT_TRUE(at::equal(all[i], same[i])) << i;
    const at::NoGradGuard no_grad;
    const double apart = (dy * (run(other, true) - run(t[1], true))).sum(at::kDouble).item<double>();
    EXPECT_NEAR((all[0] * (other - t[1])).sum(at::kDouble).item<double>(), apart, 1e-4 * std::abs(apart));
    EXPECT_FALSE(
        at::allclose(run(t[1], true), add_low_rank_(t[0].clone(), t[1], low_rank_updates(t), 2.0, {}, true)));
  }
}

TEST(AdapterOps, VectorNorm) {
  for (const int64_t count : {0, 1, 37, 16384, 1000003}) {
    const at::Tensor x = random({count}, 3);
    for (const at::DeviceType device : devices()) {
      for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble}) {
        const at::Tensor here = x.to(device, dtype), got = vector_norm(here);
        EXPECT_EQ(got.scalar_type(), at::kFloat);
        const auto expected = here.to(at::kCPU, at::kDouble).square().sum().sqrt().item<double>();
        EXPECT_NEAR(got.item<double>(), expected, 1e-6 * expected) << count << ", " << dtype << " on " << device;
      }
    }
  }
  // Parts of a dense tensor, and what is not finite.
  const at::Tensor x = random({8, 6}).to(at::kFloat);
  EXPECT_FLOAT_EQ(vector_norm(x.t()).item<float>(), vector_norm(x).item<float>());
  EXPECT_TRUE(std::isnan(vector_norm(at::tensor({1.0f, std::nanf("")})).item<float>()));
  EXPECT_TRUE(std::isinf(vector_norm(at::tensor({1.0f, std::numeric_limits<float>::infinity()})).item<float>()));
}

}  // namespace
}  // namespace caldera
