// Products in 8-bit floats: rounding, sums, gradients; and what is refused.
#include "model/ops/float8.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/error.h"
#include "model/lora.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"
#include "tests/aten.h"

namespace caldera {
namespace {

at::Tensor normal(at::IntArrayRef shape, double std, const std::string& name) {
  at::Tensor values = at::empty(shape);
  init_normal_(values, std, 11, name);
  return values.to(at::kBFloat16);
}

at::Tensor restored(const Float8Rows& rows) {
  return rows.values_NK.to(at::kDouble) * rows.scale_N1.to(at::kDouble);
}

TEST(Float8, RowsAreRoundedByTheirOwnPowerOfTwo) {
  at::Tensor x =
      normal({6, 40}, 1, "x") * at::tensor({1e-6, 1e-2, 1.0, 3.0, 1e4, 0.0}).view({6, 1}).to(at::kBFloat16);
  const Float8Rows rows = quantize_float8(x);
  EXPECT_EQ(rows.values_NK.scalar_type(), at::kFloat8_e4m3fn);
  const at::Tensor values = rows.values_NK.to(at::kDouble), back = restored(rows), wanted = x.to(at::kDouble);
  for (int64_t row = 0; row < 5; ++row) {
    const double largest = wanted[row].abs().max().item<double>();
    EXPECT_EQ(rows.scale_N1[row].item<double>(), std::exp2(-std::floor(std::log2(448 / largest)))) << row;
    EXPECT_GT(values[row].abs().max().item<double>(), 200) << row;
    // Three bits behind the leading one; below 2^-6 steps of 2^-9.
    const at::Tensor bound = at::maximum(wanted[row].abs() / 16, rows.scale_N1[row].to(at::kDouble) / 1024);
    EXPECT_TRUE(((back[row] - wanted[row]).abs() <= bound).all().item<bool>()) << row;
  }
  EXPECT_TRUE(at::equal(back[5], wanted[5]));
  // What fits is left as it is; bfloat16 holds every rounded value.
  EXPECT_TRUE(at::equal(restored(quantize_float8(back.to(at::kBFloat16))), back));
}

TEST(Float8, WhatIsNotFiniteIsNotHidden) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    at::Tensor x = normal({3, 16}, 1, "x");
    x[1][5] = bad;
    const at::Tensor y = float8_product(x, normal({16, 16}, 1, "w"));
    EXPECT_TRUE(y[1].isnan().all().item<bool>());
    EXPECT_TRUE(y[0].isfinite().all().item<bool>());
  }
}

TEST(Float8, TheProductIsThatOfTheRoundedFactors) {
  for (const auto& [M, K, N] :
       {std::tuple<int64_t, int64_t, int64_t>{5, 32, 48}, {37, 21, 16}, {1, 160, 32}, {64, 3, 16}}) {
    SCOPED_TRACE(testing::Message() << M << " " << K << " " << N);
    const at::Tensor a = normal({M, K}, 1, "a"), b = normal({K, N}, 0.1, "b");
    const at::Tensor got = float8_product(a, b);
    EXPECT_EQ(got.scalar_type(), at::kBFloat16);
    const at::Tensor wanted = restored(quantize_float8(a)).matmul(restored(quantize_float8(b.t())).t());
    const at::Tensor bound = wanted.abs() * 0x1p-8 + 1e-5 * static_cast<double>(K);
    EXPECT_TRUE(((got.to(at::kDouble) - wanted).abs() <= bound).all().item<bool>());
    // Whatever the factors' strides.
    EXPECT_TRUE(at::equal(float8_product(a.t().contiguous().t(), b.t().contiguous().t()), got));
    if (K > 16) {
      const at::Tensor exact = a.to(at::kDouble).matmul(b.to(at::kDouble));
      const double error = ((got.to(at::kDouble) - exact).norm() / exact.norm()).item<double>();
      EXPECT_LT(error, 0.06);
      EXPECT_GT(error, 0.005);
    }
  }
}

TEST(Float8, AnAffineLayersThreeProductsAreIn8Bits) {
  const at::Tensor x = normal({7, 32}, 1, "x").set_requires_grad(true),
                   weight = normal({48, 32}, 0.2, "weight").set_requires_grad(true),
                   bias = normal({48}, 1, "bias").set_requires_grad(true), dy = normal({7, 48}, 1, "dy");
  const at::Tensor y = affine(x, weight, bias, /*needs_value=*/true, /*in_float8=*/true);
  EXPECT_TRUE(at::equal(y, float8_product(x.detach(), weight.detach().t()) + bias.detach()));
  EXPECT_FALSE(at::equal(y, affine(x, weight, bias)));
  y.backward(dy);
  EXPECT_TRUE(at::equal(x.grad(), float8_product(dy, weight.detach())));
  EXPECT_TRUE(at::equal(weight.grad(), float8_product(dy.t(), x.detach())));
  EXPECT_TRUE(at::equal(bias.grad(), dy.sum(0)));

  // Its input made again in the backward pass, and its value left out: the same gradients.
  const std::vector<at::Tensor> expected = {x.grad().clone(), weight.grad().clone(), bias.grad().clone()};
  for (const bool needs_value : {true, false}) {
    for (at::Tensor leaf : {x, weight, bias}) leaf.mutable_grad().reset();
    const auto make = [](const at::Tensor& source) { return source * 1; };
    const at::Tensor again = affine_of(make, x, weight, bias, needs_value, true);
    if (needs_value) {
      EXPECT_TRUE(at::equal(again, y));
    }
    again.backward(dy);
    EXPECT_TRUE(at::equal(x.grad(), expected[0]));
    EXPECT_TRUE(at::equal(weight.grad(), expected[1]));
    EXPECT_TRUE(at::equal(bias.grad(), expected[2]));
  }
}

TEST(Float8, OlderGpusAreRefused) {
  EXPECT_EQ(float8_fault(90), "");
  EXPECT_EQ(float8_fault(89), "");
  EXPECT_EQ(float8_fault(80),
            "float8: true needs a GPU whose tensor cores multiply 8-bit floats (compute capability 8.9 or "
            "more: Ada, "
            "Hopper); this one has 8.0");
  check_float8(at::kCPU);  // goes there, for tests of the numbers
}

TEST(Float8, LayersOfOddSizesAreRefused) {
  Linear linear(32, {{"model.layers.0.self_attn.q_proj", 16}, {"model.layers.0.self_attn.k_proj", 8}}, false);
  try {
    linear.use_float8();
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(
        error.what(),
        "float8: true: model.layers.0.self_attn.q_proj has 32 inputs, and 24 outputs with those that share "
        "its product; both must be multiples of 16");
  }
}

}  // namespace
}  // namespace caldera
