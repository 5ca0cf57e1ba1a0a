// Products and linear layers against ATen in double precision: transposed views, batches, sums in place,
// gradients.
#include "model/ops/frozen_weights.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"
#include "model/ops/widened_product.h"
#include "tests/aten.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <array>
#include <limits>

namespace caldera {
namespace {

double norm_error(const at::Tensor& got, const at::Tensor& expected) {
  return ((got.to(at::kDouble) - expected).norm() / expected.norm()).item<double>();
}

class Matmul : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  at::Tensor random(at::IntArrayRef shape) const { return at::randn(shape).to(GetParam()); }
  double tolerance() const { return GetParam() == at::kFloat ? 1e-6 : 5e-3; }
};

TEST_P(Matmul, TakesTransposedViewsAndSlices) {
  at::manual_seed(1);
  const at::Tensor a = random({37, 50}), b = random({29, 50}), wide = random({37, 80});
  const at::Tensor a64 = a.to(at::kDouble), b64 = b.to(at::kDouble);
  EXPECT_LT(norm_error(matrix_product(a, b.t()), a64.mm(b64.t())), tolerance());
  EXPECT_LT(norm_error(matrix_product(a.t(), wide), a64.t().mm(wide.to(at::kDouble))), tolerance());
  const at::Tensor slice = wide.narrow(1, 7, 50);  // rows farther apart than they are long
  EXPECT_LT(norm_error(matrix_product(slice, b.t()), slice.to(at::kDouble).mm(b64.t())), tolerance());
}

TEST_P(Matmul, TakesBatches) {
  const at::Tensor a = random({3, 17, 20}), b = random({3, 11, 20});
  EXPECT_LT(
      norm_error(matrix_product(a, b.transpose(1, 2)), a.to(at::kDouble).bmm(b.to(at::kDouble).transpose(1, 2))),
      tolerance());
}

TEST_P(Matmul, AddsToWhatIsThere) {
  const at::Tensor a = random({19, 33}), b = random({33, 21}), before = random({19, 21});
  const at::Tensor out = before.clone();
  matrix_product_into(a, b, out, /*accumulate=*/true);
  EXPECT_LT(norm_error(out, before.to(at::kDouble) + a.to(at::kDouble).mm(b.to(at::kDouble))), tolerance());
}

TEST_P(Matmul, IsTheSameForLargeFactors) {
  at::manual_seed(3);
  const at::Tensor a = random({200, 130}), b = random({90, 130}), c = random({200, 90});
  const at::Tensor a64 = a.to(at::kDouble), b64 = b.to(at::kDouble), c64 = c.to(at::kDouble);
  EXPECT_LT(norm_error(matrix_product(a, b.t()), a64.mm(b64.t())), tolerance());
  EXPECT_LT(norm_error(matrix_product(c, b), c64.mm(b64)), tolerance());
  EXPECT_LT(norm_error(matrix_product(c.t(), a), c64.t().mm(a64)), tolerance());
}

// Wide, high and small results, cut into blocks or not; b as it is or widened before.
TEST(WidenedProduct, IsRoundedOnceWhateverItsBlocks) {
  at::manual_seed(4);
  const auto is_rounded_once = [](const at::Tensor& got, const at::Tensor& exact) {
    return ((got.to(at::kDouble) - exact).abs() <= exact.abs() / 256 + 1e-4).all().item<bool>();
  };
  for (const auto& [M, K, N] : {std::array<int64_t, 3>{5, 70, 9}, {1100, 40, 2100}, {2100, 40, 1100}, {70, 1, 64}, {40, 9000, 30}}) {
    const auto make = [](int64_t rows, int64_t cols, bool transposed) {
      return transposed ? at::randn({cols, rows}).to(at::kBFloat16).t() : at::randn({rows, cols}).to(at::kBFloat16);
    };
    for (const int layout : {0, 1, 2, 3}) {
      const at::Tensor a = make(M, K, (layout & 1) != 0), b = make(K, N, (layout & 2) != 0), before = make(M, N, false);
      const at::Tensor exact = a.to(at::kDouble).mm(b.to(at::kDouble));
      at::Tensor out = before.clone(), with_wide = before.clone();
      widened_product_into(a, b, out);
      widened_product_into(a, b.to(at::kFloat), with_wide);
      EXPECT_TRUE(at::equal(out, with_wide)) << M << layout;
      EXPECT_TRUE(is_rounded_once(out, exact)) << M << layout;
      out = before.clone();
      widened_product_into(a, b, out, /*accumulate=*/true);
      EXPECT_TRUE(is_rounded_once(out, exact + before.to(at::kDouble))) << M << layout;
    }
  }
}

TEST_P(Matmul, OfNothingIsZeroOrEmpty) {
  EXPECT_EQ(matrix_product(random({0, 5}), random({5, 3})).sizes(), at::IntArrayRef({0, 3}));
  EXPECT_EQ(matrix_product(random({2, 0}), random({0, 3})).abs().sum().item<double>(), 0);
}

TEST_P(Matmul, AffineGivesTheGradientsOfALinearLayer) {
  at::Tensor x = random({2, 13, 24}), weight = random({40, 24}), bias = random({40});
  const at::Tensor grad = random({2, 13, 40});
  std::vector<at::Tensor> inputs, exact;
  for (at::Tensor* tensor : {&x, &weight, &bias}) {
    exact.push_back(tensor->to(at::kDouble).requires_grad_());
    inputs.push_back(tensor->requires_grad_());
  }
  const at::Tensor y = affine(x, weight, bias), expected = at::linear(exact[0], exact[1], exact[2]);
  EXPECT_LT(norm_error(y.detach(), expected.detach()), tolerance());
  const auto got = torch::autograd::grad({y}, inputs, {grad});
  const auto wanted = torch::autograd::grad({expected}, exact, {grad.to(at::kDouble)});
  for (size_t i = 0; i < inputs.size(); ++i)
    EXPECT_LT(norm_error(got[i], wanted[i]), tolerance()) << "input " << i;
}

TEST_P(Matmul, AffineOfOneRowLeavesItsBiasAsItIs) {
  const at::Tensor x = random({1, 40}), weight = random({24, 40}).set_requires_grad(true),
                   bias = random({24}).set_requires_grad(true), before = bias.detach().clone();
  const at::Tensor first = affine(x, weight, bias);
  EXPECT_TRUE(at::equal(bias, before));
  EXPECT_TRUE(at::equal(affine(x, weight, bias), first));
}

TEST_P(Matmul, AFrozenWeightHasNoGradientAndItsLayerMayBeAddedToInPlace) {
  const at::Tensor weight = random({8, 6});
  at::Tensor x = random({5, 6}).requires_grad_();
  at::Tensor y = affine(x, weight);
  y.add_(1);
  y.sum().backward();
  EXPECT_FALSE(weight.grad().defined());
  EXPECT_LT(norm_error(x.grad(), weight.to(at::kDouble).sum(0).expand({5, 6})), tolerance());
}

// It is the largest matrix, and its gradient comes at a step's peak.
TEST_P(Matmul, OfAFrozenOutputProjectionThereIsOneCopy) {
  const at::Tensor weight = random({96, 64}), targets = at::randint(0, 96, {70}, at::kLong);
  const at::Tensor hidden = random({70, 64}).requires_grad_();
  const auto run = [&] { return torch::autograd::grad({linear_cross_entropy(hidden, weight, targets)}, {hidden})[0]; };
  const at::Tensor before = run();
  const FrozenWeights frozen({weight});
  EXPECT_TRUE(at::equal(run(), before));
  EXPECT_EQ(frozen.num_bytes(), weight.numel() * frozen_bytes_each(GetParam(), /*forward_only=*/true));
}

TEST_P(Matmul, FrozenWeightsKeepTheirOrderAndChangeNoBit) {
  at::manual_seed(2);
  at::Tensor weight = random({96, 64}), bias = random({96});
  const at::Tensor x = random({70, 64}).requires_grad_(), grad = random({70, 96});
  const auto run = [&] {
    const at::Tensor y = affine(x, weight), with_bias = affine(x, weight, bias);
    at::Tensor into = at::empty({70, 64}, x.options().requires_grad(false));
    matrix_product_into(grad, weight, into);
    return std::vector<at::Tensor>{y.detach(), with_bias.detach(), torch::autograd::grad({y}, {x}, {grad})[0], into};
  };
  const auto expect_equal = [](const std::vector<at::Tensor>& got, const std::vector<at::Tensor>& expected) {
    for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(at::equal(got[i], expected[i])) << i;
  };
  const std::vector<at::Tensor> before = run();
  {
    const FrozenWeights frozen({weight, random({3, 3}).t(), bias.new_empty({0, 4})});
    EXPECT_EQ(frozen.num_bytes(), 0);  // laid out when they are first used
    expect_equal(run(), before);
    const auto expected = weight.numel() * frozen_bytes_each(GetParam(), /*forward_only=*/false);
    EXPECT_EQ(frozen.num_bytes(), expected);
    expect_equal(run(), before);
    EXPECT_EQ(frozen.num_bytes(), expected);
    // Other weights do not get these numbers, nor does this one once it has changed.
    const at::Tensor other = random({96, 64});
    EXPECT_LT(norm_error(matrix_product(x.detach(), other.t()), x.to(at::kDouble).mm(other.to(at::kDouble).t()).detach()),
              tolerance());
    weight.mul_(2);
    EXPECT_TRUE(at::equal(run()[0], before[0] * 2));
    EXPECT_TRUE(at::equal(run()[2], before[2] * 2));
    weight.mul_(0.5);
  }
  expect_equal(run(), before);
}

TEST_P(Matmul, FewRowsAreTheSameWithTheirWayOfTheirOwn) {
  for (const int64_t num_rows : {1, 3, 4}) {
    const at::Tensor x = random({num_rows, 70}), weight = random({29, 70}), bias = random({29});
    const at::Tensor expected = at::linear(x.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble));
    const at::NoGradGuard no_grad;
    EXPECT_LT(norm_error(affine_few_rows(x, weight, bias), expected), tolerance()) << num_rows;
    const FewRowsGuard guard;
    const at::Tensor y = affine(x, weight, bias);
    EXPECT_TRUE(at::equal(y, affine_few_rows(x, weight, bias))) << num_rows;
    // A row's bits do not depend on the others.
    EXPECT_TRUE(at::equal(y.narrow(0, 0, 1), affine(x.narrow(0, 0, 1), weight, bias))) << num_rows;
  }
}

TEST_P(Matmul, FewRowsOfAnyWidthAndHeight) {
  const at::NoGradGuard no_grad;
  for (const int64_t inputs : {1, 15, 31, 32, 33, 64, 65, 127, 200}) {
    for (const int64_t outputs : {1, 2, 3, 4, 5, 7}) {
      const at::Tensor x = random({2, inputs}), weight = random({outputs, inputs});
      const at::Tensor expected = at::linear(x.to(at::kDouble), weight.to(at::kDouble));
      const double bound = (x.to(at::kDouble).norm() * weight.to(at::kDouble).norm()).item<double>();
      EXPECT_LT((affine_few_rows(x, weight).to(at::kDouble) - expected).norm().item<double>(),
                tolerance() * bound)
          << inputs << " -> " << outputs;
      const Int8Weight rounded = quantize_int8(weight);
      const at::Tensor restored =
          rounded.values_OI.to(at::kDouble) * rounded.scale_O.to(at::kDouble).unsqueeze(1);
      const at::Tensor wanted = at::linear(x.to(at::kDouble), restored);
      EXPECT_LT((affine_int8(x, rounded).to(at::kDouble) - wanted).norm().item<double>(),
                (tolerance() + 5e-5) * bound)
          << inputs << " -> " << outputs;
    }
  }
}

TEST_P(Matmul, FewRowsPassOnWhatIsNotFinite) {
  const at::NoGradGuard no_grad;
  at::Tensor x = random({3, 40});
  x[1][7] = std::numeric_limits<float>::infinity();
  x[2].zero_();
  const at::Tensor weight = random({6, 40});
  for (const at::Tensor& y : {affine_few_rows(x, weight), affine_int8(x, quantize_int8(weight))}) {
    EXPECT_TRUE(y[0].isfinite().all().item<bool>());
    EXPECT_FALSE(y[1].isfinite().any().item<bool>());
    EXPECT_TRUE((y[2] == 0).all().item<bool>());
  }
}

TEST_P(Matmul, Int8WeightsErrByTheirRounding) {
  const at::Tensor weight = at::randn({64, 96}), bias = at::randn({64});
  const Int8Weight rounded = quantize_int8(weight);
  EXPECT_EQ(rounded.values_OI.scalar_type(), at::kChar);
  const at::Tensor restored =
      rounded.values_OI.to(at::kDouble) * rounded.scale_O.to(at::kDouble).unsqueeze(1);
  const at::Tensor bound = weight.abs().amax(1).to(at::kDouble) / 127 * 0.5001;
  EXPECT_TRUE(((restored - weight.to(at::kDouble)).abs() <= bound.unsqueeze(1)).all().item<bool>());
  for (const int64_t num_rows : {1, 4, 9}) {  // with their own kernel, and restored for a product
    const at::Tensor x = random({num_rows, 96});
    const at::Tensor expected = at::linear(x.to(at::kDouble), restored, bias.to(at::kDouble));
    // The rows are rounded to 16 bits at the most.
    EXPECT_LT(norm_error(affine_int8(x, rounded, bias.to(GetParam())), expected), 2 * tolerance() + 5e-5)
        << num_rows;
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Matmul, ::testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace caldera
