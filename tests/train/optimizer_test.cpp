#include "train/optimizer.h"

#include <gtest/gtest.h>

#include <cmath>

namespace caldera {
namespace {

// Ten updates of one weight by the formula of arXiv 1711.05101, in double.
double reference(double weight, double lr, double decay, const std::vector<double>& gradients) {
  double m = 0, v = 0;
  for (size_t t = 1; t <= gradients.size(); ++t) {
    const double g = gradients[t - 1];
    weight *= 1 - lr * decay;
    m = 0.9 * m + 0.1 * g;
    v = 0.999 * v + 0.001 * g * g;
    const double m_hat = m / (1 - std::pow(0.9, t)), v_hat = v / (1 - std::pow(0.999, t));
    weight -= lr * m_hat / (std::sqrt(v_hat) + 1e-8);
  }
  return weight;
}

AdamW make(at::Tensor& matrix, at::Tensor& bias, double weight_decay) {
  matrix.set_requires_grad(true);
  bias.set_requires_grad(true);
  return AdamW({{"projector", 0.01, {{"matrix", &matrix}, {"bias", &bias}}}}, {.weight_decay = weight_decay});
}

}  // namespace

TEST(AdamW, FollowsTheFormulaAndSparesBiasesFromDecay) {
  at::Tensor matrix = at::full({2, 2}, 0.5), bias = at::full({2}, 0.5);
  AdamW optimizer = make(matrix, bias, 0.1);
  std::vector<double> gradients;
  for (int t = 0; t < 10; ++t) {
    gradients.push_back(std::sin(t + 1.0));
    matrix.mutable_grad() = at::full({2, 2}, gradients.back());
    bias.mutable_grad() = at::full({2}, gradients.back());
    optimizer.take_gradients(false);
    optimizer.step(1.0, 1.0);
  }
  EXPECT_NEAR(matrix[1][0].item<double>(), reference(0.5, 0.01, 0.1, gradients), 1e-6);
  EXPECT_NEAR(bias[1].item<double>(), reference(0.5, 0.01, 0.0, gradients), 1e-6);
}

TEST(AdamW, BFloat16WeightsKeepFloat32Masters) {
  // An update far below bfloat16's resolution at 1.0 (2^-8) must add up over steps instead of vanishing.
  at::Tensor matrix = at::ones({2, 2}, at::kBFloat16), bias = at::ones({2}, at::kBFloat16);
  AdamW optimizer = make(matrix, bias, 0);
  for (int t = 0; t < 100; ++t) {
    matrix.mutable_grad() = at::ones({2, 2}, at::kBFloat16);
    optimizer.take_gradients(false);
    optimizer.step(0.01, 1.0);  // learning rate 1e-4
  }
  EXPECT_NEAR(optimizer.masters()[0].second[0][0].item<double>(), 0.99, 1e-4);
  EXPECT_NEAR(matrix[0][0].item<double>(), 0.99, 4e-3);
  EXPECT_EQ(bias[0].item<double>(), 1.0);
}

TEST(AdamW, MicroBatchesOfBFloat16SumInFloat32) {
  at::Tensor matrix = at::zeros({1, 1}, at::kBFloat16), bias = at::zeros({1}, at::kBFloat16);
  AdamW optimizer = make(matrix, bias, 0);
  for (const double g : {256.0, 1.0, 1.0}) {  // 256 + 1 is 256 in bfloat16
    matrix.mutable_grad() = at::full({1, 1}, g, at::kBFloat16);
    optimizer.take_gradients(true);
  }
  EXPECT_EQ(optimizer.grad_norm().item<double>(), 258.0);
}

TEST(AdamW, FusedTensorsAreListedByTheirParts) {
  at::Tensor qkv = at::arange(12, at::kFloat).view({6, 2}).clone();
  qkv.set_requires_grad(true);
  AdamW optimizer({{"language_model", 0.1, {{"q", &qkv, 0, 2}, {"k", &qkv, 2, 2}, {"v", &qkv, 4, 2}}}}, {});
  const auto masters = optimizer.masters();
  ASSERT_EQ(masters.size(), 3u);
  EXPECT_EQ(masters[1].first, "k");
  EXPECT_EQ(masters[1].second[0][0].item<float>(), 4.0f);
  EXPECT_EQ(optimizer.moments().size(), 6u);
  qkv.mutable_grad() = at::ones({6, 2});
  optimizer.take_gradients(false);
  EXPECT_NEAR(optimizer.grad_norm().item<double>(), std::sqrt(12.0), 1e-6);  // once, not once a part
}

}  // namespace caldera
