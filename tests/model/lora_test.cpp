// Adapters on one linear layer.
#include "model/lora.h"

#include <gtest/gtest.h>

#include <cmath>

namespace caldera {
namespace {

Linear make_linear(bool has_bias = false) {
  Linear linear(6, {{"model.layers.0.self_attn.q_proj", 5}, {"model.layers.0.self_attn.k_proj", 3}},
                has_bias);
  NamedTensors tensors;
  linear.append_tensors(tensors);
  for (const NamedTensor& tensor : tensors) {
    at::Tensor value = tensor.value();
    init_normal_(value, 0.5, 1, tensor.name);
  }
  return linear;
}

at::Tensor find(Linear& linear, const std::string& end) {
  NamedTensors tensors;
  linear.append_tensors(tensors);
  for (const NamedTensor& tensor : tensors)
    if (tensor.name.ends_with(end)) return tensor.value();
  return {};
}

at::Tensor inputs() {
  at::Tensor x = at::empty({7, 6});
  init_normal_(x, 1, 2, "x");
  return x;
}

TEST(Lora, StartsAsNothing) {
  Linear linear = make_linear(true);
  const at::Tensor before = linear.forward(inputs(), {});
  linear.attach({.lora_r = 2}, 3);
  EXPECT_TRUE(at::equal(linear.forward(inputs(), {}), before));
  const at::Tensor a = find(linear, "q_proj.lora_A.weight"), b = find(linear, "q_proj.lora_B.weight");
  EXPECT_EQ(a.sizes(), (std::vector<int64_t>{2, 6}));
  EXPECT_EQ(b.sizes(), (std::vector<int64_t>{5, 2}));
  // kaiming_uniform(a = sqrt(5)): uniform within 1 / sqrt(6).
  EXPECT_LE(a.abs().max().item<double>(), 1 / std::sqrt(6.0));
  EXPECT_GT(a.abs().max().item<double>(), 0.7 / std::sqrt(6.0));
  EXPECT_FALSE(at::equal(a, find(linear, "k_proj.lora_A.weight")));
  Linear other = make_linear(true);
  other.attach({.lora_r = 2}, 4);
  EXPECT_FALSE(at::equal(a, find(other, "q_proj.lora_A.weight")));
}

TEST(Lora, AddsItsProductToItsOwnRows) {
  for (const bool rslora : {false, true}) {
    Linear linear = make_linear(true);
    const at::Tensor before = linear.forward(inputs(), {});
    const LoraConfig config{.lora_r = 4, .lora_alpha = 8, .use_rslora = rslora, .target_modules = {"k_proj"}};
    EXPECT_DOUBLE_EQ(config.scaling(), rslora ? 4.0 : 2.0);
    linear.attach(config, 3);
    EXPECT_FALSE(find(linear, "q_proj.lora_A.weight").defined());
    at::Tensor b = find(linear, "k_proj.lora_B.weight");
    init_normal_(b, 1, 5, "b");
    const at::Tensor after = linear.forward(inputs(), {});
    const at::Tensor update =
        inputs().matmul(find(linear, "k_proj.lora_A.weight").t()).matmul(b.t()) * config.scaling();
    EXPECT_TRUE(at::equal(after.narrow(1, 0, 5), before.narrow(1, 0, 5)));
    EXPECT_TRUE(at::allclose(after.narrow(1, 5, 3), before.narrow(1, 5, 3) + update, 1e-5, 1e-6));
    linear.merge();
    EXPECT_FALSE(find(linear, "lora_A.weight").defined());
    EXPECT_TRUE(at::allclose(linear.forward(inputs(), {}), after, 1e-5, 1e-6));
  }
}

TEST(Lora, DropoutIsAFunctionOfTheSeedAndKeepsTheMean) {
  Linear linear = make_linear();
  linear.attach({.lora_r = 3, .lora_alpha = 3, .lora_dropout = 0.4}, 3);
  at::Tensor b = find(linear, "q_proj.lora_B.weight");
  init_normal_(b, 1, 5, "b");
  const at::Tensor plain = linear.forward(inputs(), {});
  EXPECT_TRUE(at::equal(linear.forward(inputs(), 1), linear.forward(inputs(), 1)));
  EXPECT_FALSE(at::equal(linear.forward(inputs(), 1), linear.forward(inputs(), 2)));
  at::Tensor sum = at::zeros_like(plain);
  constexpr uint64_t kDraws = 4000;
  for (uint64_t seed = 0; seed < kDraws; ++seed) sum += linear.forward(inputs(), seed);
  EXPECT_LT((sum / static_cast<double>(kDraws) - plain).abs().max().item<double>(), 0.15);
}

}  // namespace
}  // namespace caldera
