#include "tests/aten.h"
#include "train/optimizer.h"

#include <gtest/gtest.h>

#include <cmath>

#include "model/ops/accumulate.h"

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
  EXPECT_NEAR(optimizer.masters()[0].second.values()[0][0].item<double>(), 0.99, 1e-4);
  EXPECT_NEAR(matrix[0][0].item<double>(), 0.99, 4e-3);
  EXPECT_EQ(bias[0].item<double>(), 1.0);
}

// Fused tensors and owned parts too: what masters() and moments() show, another goes on from, to the last bit.
TEST(AdamW, StateOfBFloat16WeightsGoesOnElsewhere) {
  const auto make_groups = [](at::Tensor& tensor) {
    return std::vector<ParameterGroup>{{"language_model", 0.1, {{"q", &tensor, 0, 2}, {"k", &tensor, 2, 3}}}};
  };
  at::manual_seed(6);
  const at::Tensor start = at::randn({5, 8}).to(at::kBFloat16), gradient = at::randn({5, 8});
  for (const bool is_part : {false, true}) {
    const auto make_one = [&](at::Tensor& tensor) {
      tensor = start.clone().set_requires_grad(true);
      return AdamW(make_groups(tensor), {},
                   is_part ? OwnedParts{{&tensor, {11, tensor.detach().view(-1).slice(0, 11, 33)}}} : OwnedParts());
    };
    at::Tensor one_weight, two_weight;
    AdamW one = make_one(one_weight), two = make_one(two_weight);
    const auto update = [&](AdamW& optimizer, at::Tensor& weight) {
      optimizer.set_gradient(&weight, is_part ? gradient.view(-1).slice(0, 11, 33) : gradient);
      optimizer.step(1, 1);
    };
    for (int i = 0; i < 3; ++i) update(one, one_weight);
    const auto copy = [](const StateList& from, const StateList& to) {
      ASSERT_EQ(from.size(), to.size());
      for (size_t i = 0; i < to.size(); ++i) to[i].second.assign(from[i].second.values());
    };
    copy(one.masters(), two.masters());
    copy(one.moments(), two.moments());
    two.restore(one.num_updates());
    EXPECT_TRUE(at::equal(two_weight, one_weight));
    EXPECT_FALSE(at::equal(one_weight, start));
    for (int i = 0; i < 3; ++i) {
      update(one, one_weight);
      update(two, two_weight);
    }
    const auto expected = one.masters(), got = two.masters();
    ASSERT_EQ(got.size(), 2u);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_EQ(got[i].first, is_part ? (i == 0 ? "q@11" : "k@0") : (i == 0 ? "q" : "k"));
      EXPECT_TRUE(at::equal(got[i].second.values(), expected[i].second.values())) << i;
    }
  }
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

TEST(AdamW, SumsTakeBothDtypesAndAnyLayout) {
  at::manual_seed(4);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor sum = at::randn({37, 5}), part = at::randn({5, 37}).to(dtype).t();
    const at::Tensor expected = sum + part.to(at::kFloat);
    accumulate_(sum, part);
    EXPECT_TRUE(at::equal(sum, expected));
  }
}

TEST(AdamW, FusedTensorsAreListedByTheirParts) {
  at::Tensor qkv = at::arange(12, at::kFloat).view({6, 2}).clone();
  qkv.set_requires_grad(true);
  AdamW optimizer({{"language_model", 0.1, {{"q", &qkv, 0, 2}, {"k", &qkv, 2, 2}, {"v", &qkv, 4, 2}}}}, {});
  const auto masters = optimizer.masters();
  ASSERT_EQ(masters.size(), 3u);
  EXPECT_EQ(masters[1].first, "k");
  EXPECT_EQ(masters[1].second.values()[0][0].item<float>(), 4.0f);
  EXPECT_EQ(optimizer.moments().size(), 6u);
  qkv.mutable_grad() = at::ones({6, 2});
  optimizer.take_gradients(false);
  EXPECT_NEAR(optimizer.grad_norm().item<double>(), std::sqrt(12.0), 1e-6);  // once, not once a part
}

TEST(AdamW, EightBitStatesAreThoseOfMatricesAndListedWithTheirScales) {
  at::Tensor qkv = at::zeros({96, 128}), embed = at::zeros({64, 128}), norm = at::zeros({8192}),
             small = at::zeros({8, 8}), odd = at::zeros({100, 50}), places = at::zeros({64, 128}),
             patches = at::zeros({64, 3, 16, 16});
  for (at::Tensor* tensor : {&qkv, &embed, &norm, &small, &odd, &places, &patches})
    tensor->set_requires_grad(true);
  const std::vector<ParameterGroup> groups = {{"language_model",
                                               0.1,
                                               {{"q", &qkv, 0, 64},
                                                {"k", &qkv, 64, 32},
                                                {"model.embed_tokens.weight", &embed},
                                                {"norm", &norm},
                                                {"small", &small},
                                                {"gate", &odd, 0, 50},
                                                {"up", &odd, 50, 50}}}};  // "up" begins inside a block
  EXPECT_EQ(with_8bit_states(groups), (std::unordered_set<const at::Tensor*>{&qkv}));
  // Of a tower's embeddings positions are looked up; its patches pass through a convolution.
  const std::string root = "vision_tower.vision_model.embeddings.";
  EXPECT_EQ(with_8bit_states({{"vision_tower",
                               0.1,
                               {{root + "position_embedding.weight", &places},
                                {root + "patch_embedding.weight", &patches}}}}),
            (std::unordered_set<const at::Tensor*>{&patches}));
  AdamW optimizer(groups, {.has_8bit_states = true});
  int num_scales = 0;
  for (const auto& [name, moment] : optimizer.moments()) {
    const at::Tensor values = moment.values();
    EXPECT_EQ(values.scalar_type() == at::kByte, name.ends_with("g.q") || name.ends_with("q.q") ||
                                                     name.ends_with("g.k") || name.ends_with("q.k"))
        << name;
    if (name.find("_scale.") == std::string::npos) continue;
    EXPECT_EQ(values.numel(), name.ends_with(".q") ? 32 : 16) << name;
    ++num_scales;
  }
  EXPECT_EQ(num_scales, 4);
}

TEST(AdamW, APartIsUpdatedAsTheWholeIs) {
  // Two owners of a fused tensor in bfloat16 without masters, with 8-bit states, cut inside "k".
  const auto make_groups = [](at::Tensor& tensor) {
    return std::vector<ParameterGroup>{
        {"language_model", 0.1, {{"q", &tensor, 0, 64}, {"k", &tensor, 64, 32}}}};
  };
  const AdamWOptions options{.has_8bit_states = true, .has_masters = false, .seed = 3};
  at::manual_seed(0);
  const at::Tensor start = at::randn({96, 128}).to(at::kBFloat16), gradient = at::randn({96, 128});
  at::Tensor whole = start.clone().set_requires_grad(true);
  AdamW one(make_groups(whole), options);
  for (int step = 0; step < 3; ++step) {
    one.set_gradient(&whole, gradient.clone());
    one.step(1, 1);
  }
  constexpr int64_t kCut = 70 * 128;
  for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, kCut}, {kCut, 96 * 128}}) {
    at::Tensor tensor = start.clone().set_requires_grad(true);
    const at::Tensor part = tensor.detach().view(-1).slice(0, begin, end);
    AdamW half(make_groups(tensor), options, {{&tensor, {begin, part}}});
    for (int step = 0; step < 3; ++step) {
      half.set_gradient(&tensor, gradient.view(-1).slice(0, begin, end).clone());
      half.step(1, 1);
    }
    EXPECT_TRUE(at::equal(part, whole.detach().view(-1).slice(0, begin, end)));
    for (const auto& [name, moment] : half.moments()) {
      const at::Tensor values = moment.values();
      const size_t at = name.find('@');
      ASSERT_NE(at, std::string::npos);
      const int64_t first = std::stoll(name.substr(at + 1));
      for (const auto& [whole_name, whole_values] : one.moments()) {
        if (whole_name != name.substr(0, at)) continue;
        EXPECT_TRUE(at::equal(values, whole_values.values().reshape(-1).slice(0, first, first + values.numel())))
            << name;
      }
    }
  }
}

// An update of a tenth of bfloat16's resolution: rounding to nearest loses each of them.
TEST(AdamW, StochasticRoundingDescendsWhereNearestStalls) {
  at::Tensor weight = at::ones({64, 64}, at::kBFloat16).set_requires_grad(true);
  AdamW optimizer({{"projector", 0.01, {{"weight", &weight}}}}, {.has_masters = false, .seed = 1});
  EXPECT_TRUE(optimizer.masters()[0].second.values().is_alias_of(weight));
  for (int step = 0; step < 100; ++step) {
    weight.mutable_grad() = at::ones({64, 64}, at::kBFloat16);
    optimizer.take_gradients(false);
    optimizer.step(0.05, 1.0);  // learning rate 5e-4; the next bfloat16 below 1 is 4e-3 away
  }
  EXPECT_NEAR(weight.to(at::kFloat).mean().item<double>(), 1 - 100 * 5e-4, 1e-3);
  EXPECT_EQ((at::ones({}, at::kBFloat16).to(at::kFloat) - 5e-4).to(at::kBFloat16).item<float>(), 1.0f);
}

}  // namespace caldera
