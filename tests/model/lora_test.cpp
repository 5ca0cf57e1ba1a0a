// Adapters on one linear layer.
#include "model/lora.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

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

// Samples of these lengths, at these places of their step.
PackedBatch batch_of(const std::vector<int64_t>& lengths, const std::vector<int64_t>& numbers) {
  PackedBatch batch;
  batch.cu_seqlens = {0};
  for (const int64_t length : lengths) batch.cu_seqlens.push_back(batch.cu_seqlens.back() + length);
  batch.sample_numbers = numbers;
  batch.input_ids_T = at::zeros({batch.cu_seqlens.back()}, at::kLong);
  return batch;
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

TEST(Lora, ATokensKeyGoesByItsSampleAndItsPlaceInIt) {
  const at::Tensor all = dropout_keys(batch_of({3, 5, 2}, {0, 1, 2}), 9);
  EXPECT_TRUE(at::equal(dropout_keys(batch_of({2, 3}, {2, 0}), 9),
                        at::cat({all.narrow(0, 8, 2), all.narrow(0, 0, 3)})));
  EXPECT_TRUE(
      at::equal(dropout_keys(batch_of({4}, {1}), 9), all.narrow(0, 3, 4)));  // cut behind what is supervised
  std::set<int64_t> distinct;
  for (const uint64_t seed : {9u, 10u}) {
    const at::Tensor keys = dropout_keys(batch_of({3, 5, 2}, {0, 1, 2}), seed);
    distinct.insert(keys.const_data_ptr<int64_t>(), keys.const_data_ptr<int64_t>() + keys.numel());
  }
  EXPECT_EQ(distinct.size(), 20u);
}

TEST(Lora, DropoutIsAFunctionOfTheSeedAndKeepsTheMean) {
  Linear linear = make_linear();
  linear.attach({.lora_r = 3, .lora_alpha = 3, .lora_dropout = 0.4}, 3);
  at::Tensor b = find(linear, "q_proj.lora_B.weight");
  init_normal_(b, 1, 5, "b");
  const at::Tensor plain = linear.forward(inputs(), {});
  const auto dropped = [&](uint64_t seed) {
    return linear.forward(inputs(), dropout_keys(batch_of({7}, {4}), seed));
  };
  EXPECT_TRUE(at::equal(dropped(1), dropped(1)));
  EXPECT_FALSE(at::equal(dropped(1), dropped(2)));
  at::Tensor sum = at::zeros_like(plain);
  constexpr uint64_t kDraws = 4000;
  for (uint64_t seed = 0; seed < kDraws; ++seed) sum += dropped(seed);
  EXPECT_LT((sum / static_cast<double>(kDraws) - plain).abs().max().item<double>(), 0.15);
}

}  // namespace
}  // namespace caldera
