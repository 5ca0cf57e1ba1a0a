// Each operation on the CPU kernels (float32, bfloat16) against plain ATen in double, forward and gradients; where
// there is a GPU, on its kernels as well.
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>

#include "base/error.h"
#include "model/ops/adamw_compact.h"
#include "model/ops/ops.h"
#include "model/vision/vit.h"
#include "tests/aten.h"
#include "tests/model/operations.h"
#include "tests/support.h"

namespace caldera {
namespace {

TEST(Ops, RmsNorm) {
  for (const int64_t width : {576, 37, 16, 5}) {
    const Operation plain = [](const Tensors& t) {
      return t[0] * (t[0].pow(2).mean(-1, true) + 1e-5).rsqrt() * t[1];
    };
    const Operation fast = [](const Tensors& t) { return rms_norm(t[0], t[1], 1e-5); };
    expect_same(fast, plain, {random({150, width}), random({width})});
  }
}

TEST(Ops, AddRmsNorm) {
  for (const int64_t width : {64, 37}) {
    // value and residual beside each other, so that both have gradients; bfloat16 rounds the sum before its norm.
    const Operation plain = [](const Tensors& t) {
      const at::Tensor sum = t[0] + t[1];
      return at::cat({sum * (sum.pow(2).mean(-1, true) + 1e-5).rsqrt() * t[2], sum});
    };
    const Operation fast = [](const Tensors& t) {
      const auto [value, residual] = add_rms_norm(t[0], t[1], t[2], 1e-5);
      return at::cat({value, residual});
    };
    expect_same(fast, plain, {random({150, width}), random({150, width}), random({width})});
    const Operation plain_alone = [&](const Tensors& t) { return plain({t[0], at::zeros_like(t[0]), t[1]}); };
    const Operation alone = [&](const Tensors& t) { return fast({t[0], {}, t[1]}); };
    expect_same(alone, plain_alone, {random({150, width}), random({width})});
  }
}

// In one pass or in two: the same numbers, with a graph and without; so a half of a block may run again from the sum.
TEST(Ops, AddRmsNormIsASumAndANorm) {
  for (const at::DeviceType device : devices()) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const auto leaf = [&](at::IntArrayRef shape) { return random(shape).to(device, dtype).set_requires_grad(true); };
      const at::Tensor x = leaf({70, 48}), update = leaf({70, 48}), weight = leaf({48}), dy = leaf({70, 48}).detach();
      const auto [value, residual] = add_rms_norm(x, update, weight, 1e-5);
      const at::Tensor sum = (x + update).detach().requires_grad_();
      const auto [again, same] = add_rms_norm(sum, {}, weight, 1e-5);
      EXPECT_TRUE(at::equal(residual, sum));
      EXPECT_TRUE(at::equal(same, sum));
      EXPECT_TRUE(at::equal(value, again));
      const Tensors got = torch::autograd::grad({value, residual}, {x, update, weight}, {dy, dy});
      const Tensors expected = torch::autograd::grad({again, same}, {sum, weight}, {dy, dy});
      EXPECT_TRUE(at::equal(got[0], expected[0]));
      EXPECT_TRUE(at::equal(got[1], expected[0]));
      EXPECT_TRUE(at::equal(got[2], expected[1]));
      const at::NoGradGuard no_grad;
      const auto [no_graph, beside] = add_rms_norm(x, update, weight, 1e-5);
      EXPECT_TRUE(at::equal(no_graph, value));
      EXPECT_TRUE(at::equal(beside, residual));
    }
  }
}

// Only one of the two results is used.
TEST(Ops, AddRmsNormWithOneGradient) {
  const at::Tensor x = random({10, 8}).to(at::kFloat).set_requires_grad(true), weight = at::ones({8}).requires_grad_(),
                   dy = random({10, 8}).to(at::kFloat);
  const auto [value, residual] = add_rms_norm(x, {}, weight, 1e-5);
  const Tensors past = torch::autograd::grad({residual}, {x, weight}, {dy}, /*retain_graph=*/true,
                                             /*create_graph=*/false, /*allow_unused=*/true);
  EXPECT_TRUE(at::equal(past[0], dy));
  EXPECT_FALSE(past[1].defined());
  const at::Tensor alone = torch::autograd::grad({value}, {x}, {dy}, /*retain_graph=*/true)[0];
  const at::Tensor both = torch::autograd::grad({value, residual}, {x}, {dy, dy})[0];
  EXPECT_TRUE(at::allclose(both, alone + dy));
}

TEST(Ops, RmsNormLeavesAFrozenWeightAlone) {
  const at::Tensor x = random({10, 8}).to(at::kFloat).set_requires_grad(true), weight = at::ones({8});
  rms_norm(x, weight, 1e-5).sum().backward();
  EXPECT_TRUE(x.grad().defined());
  EXPECT_FALSE(weight.grad().defined());
}

TEST(Ops, Swiglu) {
  for (const int64_t width : {96, 19}) {
    const Operation plain = [](const Tensors& t) {
      const auto halves = t[0].chunk(2, -1);
      return halves[0] * halves[0].sigmoid() * halves[1];
    };
    expect_same([](const Tensors& t) { return swiglu(t[0]); }, plain, {random({130, 2 * width}, 3)});
  }
  // Far out on both sides nothing overflows.
  const at::Tensor far = at::tensor({-500.f, 500.f, 2.f, 3.f}).view({1, 4});
  EXPECT_TRUE(at::allclose(swiglu(far), at::tensor({0.f, 1500.f}).view({1, 2})));
}

TEST(Ops, QuickGelu) {
  const Operation plain = [](const Tensors& t) { return t[0] * (t[0] * 1.702).sigmoid(); };
  const Operation fast = [](const Tensors& t) { return quick_gelu(t[0]); };
  for (const int64_t width : {64, 33}) expect_same(fast, plain, {random({130, width}, 3)});
  for (const at::DeviceType device : devices()) {  // without a graph, in place
    const at::Tensor x = random({5, 7}).to(device, at::kFloat), expected = plain({x.to(at::kCPU, at::kDouble)});
    const at::Tensor y = quick_gelu(x);
    EXPECT_TRUE(y.is_same(x));
    EXPECT_LT(error(y, expected), 1e-6);
  }
}

TEST(Ops, NotANumberStaysVisible) {
  for (const auto device : devices()) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const auto options = at::TensorOptions(device).dtype(dtype);
      const at::Tensor nan = at::full({2, 32}, std::numeric_limits<float>::quiet_NaN(), options);
      EXPECT_TRUE(rms_norm(nan, at::ones({32}, options), 1e-5).isnan().all().item<bool>());
      EXPECT_TRUE(swiglu(nan).isnan().all().item<bool>());
      EXPECT_TRUE(linear_nll(nan, at::ones({7, 32}, options), at::zeros({2}, options.dtype(at::kLong)))
                      .isnan()
                      .all()
                      .item<bool>());
      const at::Tensor heads = nan.view({2, 2, 16});
      EXPECT_TRUE(packed_attention(heads, heads, heads, {0, 2}, true).isnan().all().item<bool>());
    }
  }
}

TEST(Ops, Rotary) {
  for (const int64_t width : {64, 6}) {
    const at::Tensor inv_freq =
        1.0 / at::pow(100.0, at::arange(0, width, 2).to(at::kFloat) / static_cast<double>(width));
    const Rotary rotary = rotary_tables(inv_freq, at::arange(40), 1.1, at::kFloat);
    EXPECT_EQ(rotary.cos_TK.sizes(), (std::vector<int64_t>{40, width}));
    const Operation plain = [&](const Tensors& t) {
      const at::Tensor turned =
          at::cat({-t[0].narrow(2, width / 2, width / 2), t[0].narrow(2, 0, width / 2)}, -1);
      return t[0] * rotary.cos_TK.unsqueeze(1) + turned * rotary.sin_TK.unsqueeze(1);
    };
    const auto on = [&](at::Device device) {
      return Rotary{rotary.cos_TK.to(device), rotary.sin_TK.to(device)};
    };
    const Operation fast = [&](const Tensors& t) { return apply_rotary(t[0], on(t[0].device())); };
    expect_same(fast, plain, {random({40, 3, width})});
    // A slice of a wider projection is read in place.
    for (const at::DeviceType device : devices()) {
      const at::Tensor wide = random({40, 5, width}).to(device, at::kFloat), slice = wide.narrow(1, 0, 3);
      EXPECT_TRUE(at::equal(apply_rotary(slice, on(device)), apply_rotary(slice.contiguous(), on(device))));
    }
  }
}

TEST(Ops, SplitRotaryIsASplitAndRotations) {
  constexpr int64_t kRows = 40, kHeads = 6, kKvHeads = 2, kWidth = 16;
  const at::Tensor inv_freq = 1.0 / at::pow(100.0, at::arange(0, kWidth, 2).to(at::kFloat) / double{kWidth});
  const Rotary rotary = rotary_tables(inv_freq, at::arange(kRows), 1.1, at::kFloat);
  const auto on = [&](at::Device device) { return Rotary{rotary.cos_TK.to(device), rotary.sin_TK.to(device)}; };
  const auto flat = [](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
    return at::cat({q.flatten(1), k.flatten(1), v.flatten(1)}, 1);
  };
  const Operation plain = [&](const Tensors& t) {
    const at::Tensor heads = t[0].unflatten(1, {-1, kWidth});
    const auto turned = [&](int64_t first, int64_t count) { return apply_rotary(heads.narrow(1, first, count), rotary); };
    return flat(turned(0, kHeads), turned(kHeads, kKvHeads), heads.narrow(1, kHeads + kKvHeads, kKvHeads));
  };
  const Operation fast = [&](const Tensors& t) {
    const auto [q, k, v] = split_rotary(t[0], kHeads, kKvHeads, on(t[0].device()));
    EXPECT_EQ(q.sizes(), (std::vector<int64_t>{kRows, kHeads, kWidth}));
    EXPECT_EQ(v.sizes(), (std::vector<int64_t>{kRows, kKvHeads, kWidth}));
    return flat(q, k, v);
  };
  expect_same(fast, plain, {random({kRows, (kHeads + 2 * kKvHeads) * kWidth})});
}

// Softmax attention written out, per sample and head.
at::Tensor plain_attention(const Tensors& t, const std::vector<int64_t>& cu_seqlens, bool causal) {
  const int64_t H = t[0].size(1), R = H / t[1].size(1);
  std::vector<at::Tensor> samples;
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
    const int64_t begin = cu_seqlens[s], length = cu_seqlens[s + 1] - begin;
    std::vector<at::Tensor> heads;
    for (int64_t h = 0; h < H; ++h) {
      const auto pick = [&](const at::Tensor& x, int64_t head) {
        return x.narrow(0, begin, length).select(1, head);
      };
      at::Tensor scores =
          pick(t[0], h).mm(pick(t[1], h / R).t()) / std::sqrt(static_cast<double>(t[0].size(2)));
      if (causal)
        scores = scores.masked_fill(at::ones({length, length}, at::kBool).triu(1),
                                    -std::numeric_limits<double>::infinity());
      heads.push_back(scores.softmax(-1).mm(pick(t[2], h / R)));
    }
    samples.push_back(at::stack(heads, 1));
  }
  return at::cat(samples);
}

TEST(Ops, PackedAttention) {
  // Short samples, one of a single token, one longer than a block of query rows; many samples and a single
  // one.
  const std::vector<std::vector<int64_t>> rows = {{0, 7, 8, 40, 57}, {0, 33}, {0, 300, 304, 320}, {0, 600}};
  for (const std::vector<int64_t>& cu_seqlens : rows) {
    for (const bool causal : {true, false}) {
      const Operation plain = [&](const Tensors& t) { return plain_attention(t, cu_seqlens, causal); };
      const Operation fast = [&](const Tensors& t) {
        return packed_attention(t[0], t[1], t[2], cu_seqlens, causal);
      };
      const int64_t T = cu_seqlens.back();
      expect_same(fast, plain, {random({T, 6, 8}), random({T, 2, 8}), random({T, 2, 8})});
    }
  }
}

// Widths and lengths around the kernel's units; q, k and v as views of one projection, far apart in memory.
TEST(Ops, PackedAttentionOfAnyShape) {
  const std::vector<int64_t> cu_seqlens = {0, 1, 32, 64, 97, 160, 224, 289, 419};
  for (const int64_t K : {1, 12, 32, 33, 64, 80}) {
    for (const auto& [H, G] : {std::pair<int64_t, int64_t>{1, 1}, {4, 4}, {4, 1}}) {
      const auto split = [H = H, G = G, K](const at::Tensor& qkv) {
        return qkv.view({-1, H + 2 * G, K}).split_with_sizes({H, G, G}, 1);
      };
      for (const bool causal : {true, false}) {
        const Operation plain = [&](const Tensors& t) { return plain_attention(split(t[0]), cu_seqlens, causal); };
        const Operation fast = [&](const Tensors& t) {
          const Tensors parts = split(t[0]);
          return packed_attention(parts[0], parts[1], parts[2], cu_seqlens, causal);
        };
        expect_same(fast, plain, {random({cu_seqlens.back(), (H + 2 * G) * K})});
      }
    }
  }
}

// However many threads share the work, and whatever lies beside a sample, its bits are the same.
TEST(Ops, PackedAttentionOfASampleDoesNotDependOnOthers) {
  const int num_threads = at::get_num_threads();
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const Tensors inputs = {random({300, 4, 64}).to(dtype), random({300, 2, 64}).to(dtype),
                            random({300, 2, 64}).to(dtype)};
    const auto run = [&](int64_t begin, int64_t end, const std::vector<int64_t>& cu_seqlens) {
      Tensors leaves;
      for (const at::Tensor& x : inputs) leaves.push_back(x.narrow(0, begin, end - begin).detach().set_requires_grad(true));
      const at::Tensor out = packed_attention(leaves[0], leaves[1], leaves[2], cu_seqlens, true);
      Tensors result = torch::autograd::grad({out}, leaves, {at::ones_like(out)});
      result.push_back(out.detach());
      return result;
    };
    at::set_num_threads(1);
    const Tensors together = run(0, 300, {0, 90, 200, 300});
    at::set_num_threads(2);
    const Tensors again = run(0, 300, {0, 90, 200, 300}), alone = run(90, 200, {0, 110});
    at::set_num_threads(num_threads);
    for (size_t i = 0; i < together.size(); ++i) {
      EXPECT_TRUE(at::equal(together[i], again[i])) << i;
      EXPECT_TRUE(at::equal(together[i].narrow(0, 90, 110), alone[i])) << i;
    }
  }
}

TEST(Ops, PackedAttentionWithoutKernelsAgrees) {
  const Tensors inputs = {random({40, 6, 8}), random({40, 2, 8}), random({40, 2, 8})};
  const std::vector<int64_t> cu_seqlens = {0, 7, 8, 40};
  EXPECT_LT(error(packed_attention(inputs[0], inputs[1], inputs[2], cu_seqlens, true),
                  plain_attention(inputs, cu_seqlens, true)),
            1e-12);
  const std::vector<int64_t> uniform = {0, 10, 20, 30, 40};
  EXPECT_LT(error(packed_attention(inputs[0], inputs[1], inputs[2], uniform, false),
                  plain_attention(inputs, uniform, false)),
            1e-12);
}

TEST(Ops, CachedAttentionSeesEverythingBefore) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {  // the kernels, and plain ATen
    const at::Tensor q = random({20, 6, 8}).to(dtype), k = random({20, 2, 8}).to(dtype),
                     v = random({20, 2, 8}).to(dtype);
    const at::Tensor whole = packed_attention(q, k, v, {0, 20}, true);
    const at::Tensor tail = cached_attention(q.narrow(0, 15, 5), {k}, {v}, {0, 5});
    EXPECT_TRUE(at::allclose(tail, whole.narrow(0, 15, 5), 1e-5, 1e-6));
    // Steps of one token, two sequences at once.
    const at::Tensor steps =
        cached_attention(q.slice(0, 9, 20, 10), {k.narrow(0, 0, 10), k}, {v.narrow(0, 0, 10), v}, {0, 1, 2});
    EXPECT_TRUE(at::allclose(steps, whole.slice(0, 9, 20, 10), 1e-5, 1e-6));
  }
}

TEST(Ops, LinearCrossEntropy) {
  const at::Tensor targets = at::randint(0, 91, {33}, at::kLong);
  const Operation plain = [&](const Tensors& t) {
    return -(t[0].mm(t[1].t())).log_softmax(-1).gather(1, targets.unsqueeze(1)).sum();
  };
  const Operation fast = [&](const Tensors& t) {
    return linear_cross_entropy(t[0], t[1], targets.to(t[0].device()));
  };
  expect_same(fast, plain, {random({33, 24}), random({91, 24})});
  const Operation plain_part = [&](const Tensors& t) { return plain(t) * 0.03; };
  const Operation fast_part = [&](const Tensors& t) {
    return linear_cross_entropy(t[0], t[1], targets.to(t[0].device()), 0.03);
  };
  expect_same(fast_part, plain_part, {random({33, 24}), random({91, 24})});
  // Derived from itself, without another factor.
  const at::Tensor leaf = random({33, 24}).to(at::kFloat).requires_grad_(), head = random({91, 24}).to(at::kFloat);
  linear_cross_entropy(leaf, head, targets, 0.03).backward();
  const at::Tensor of_whole = torch::autograd::grad({linear_cross_entropy(leaf, head, targets)}, {leaf})[0];
  EXPECT_LT(error(leaf.grad(), 0.03 * of_whole.to(at::kDouble)), 2e-6);
  const at::Tensor hidden = random({33, 24}), weight = random({91, 24});
  const at::Tensor per_row = linear_nll(hidden.to(at::kFloat), weight.to(at::kFloat), targets);
  EXPECT_LT(error(per_row.sum(), plain({hidden, weight})), 1e-6);
}

// A vocabulary so large that the rows go through in several chunks. The tolerance is that of a float32 matrix
// product with an inner dimension of this size.
TEST(Ops, LinearCrossEntropyInChunks) {
  const int64_t vocab = 400000;
  const at::Tensor targets = at::randint(0, vocab, {130}, at::kLong);
  const Operation plain = [&](const Tensors& t) {
    return -(t[0].mm(t[1].t())).log_softmax(-1).gather(1, targets.unsqueeze(1)).sum();
  };
  const Operation fast = [&](const Tensors& t) {
    return linear_cross_entropy(t[0], t[1], targets.to(t[0].device()));
  };
  expect_same(fast, plain, {random({130, 4}), random({vocab, 4})}, 2e-3);
}

TEST(Ops, LinearCrossEntropyComputesOnlyWhatIsWanted) {
  const at::Tensor targets = at::zeros({5}, at::kLong);
  const at::Tensor hidden = at::ones({5, 3}).set_requires_grad(true), weight = at::ones({7, 3});
  const at::Tensor loss = linear_cross_entropy(hidden, weight, targets);
  loss.backward();
  EXPECT_TRUE(hidden.grad().defined());
  EXPECT_FALSE(weight.grad().defined());
  EXPECT_FALSE(linear_cross_entropy(hidden.detach(), weight, targets).requires_grad());
}

TEST(Ops, LinearCrossEntropyOfNoRowsIsZeroWithAGraph) {
  const at::Tensor hidden = at::ones({0, 3}).set_requires_grad(true),
                   weight = at::ones({7, 3}).set_requires_grad(true);
  const at::Tensor loss = linear_cross_entropy(hidden, weight, at::empty({0}, at::kLong));
  EXPECT_EQ(loss.item<float>(), 0);
  loss.backward();
  EXPECT_TRUE(at::equal(weight.grad(), at::zeros({7, 3})));
}

TEST(Ops, LinearCrossEntropyRefusesTargetsBeyondTheVocabulary) {
  EXPECT_THAT(
      [] {
        linear_cross_entropy(at::ones({2, 3}), at::ones({7, 3}), at::tensor({1, 7}, at::kLong));
      },
      testing::ThrowsMessage<DataError>(
          testing::HasSubstr("target id 7 lies outside the model's vocabulary of 7")));
  EXPECT_THAT(
      [] {
        linear_nll(at::ones({1, 3}), at::ones({7, 3}), at::tensor({-100}, at::kLong));
      },
      testing::ThrowsMessage<DataError>(testing::HasSubstr("target id -100")));
}

// What runs on a GPU alone.
class OpsOnAGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "no GPU here (or a build without CUDA): the operations ran on the CPU alone";
  }
};

TEST_F(OpsOnAGpu, ATargetBeyondTheVocabularyMakesTheLossNotANumber) {
  const auto options = at::TensorOptions(at::kCUDA);
  const at::Tensor targets = at::tensor({1, 7}, at::kLong).to(at::kCUDA);
  EXPECT_TRUE(linear_cross_entropy(at::ones({2, 3}, options), at::ones({7, 3}, options), targets)
                  .isnan()
                  .item<bool>());
}

TEST(Ops, ChunksOfLogitsAreAsFewAsFitAndAlike) {
  constexpr int64_t kMost = (96 << 20) / (32000 * 2);  // rows of 32,000 bfloat16 logits in 96 MiB
  EXPECT_EQ(cross_entropy_chunk(0, 32000, 2), 1);
  EXPECT_EQ(cross_entropy_chunk(5, 32000, 2), 5);
  EXPECT_EQ(cross_entropy_chunk(kMost, 32000, 2), kMost);
  EXPECT_EQ(cross_entropy_chunk(kMost + 1, 32000, 2), (kMost + 2) / 2);
  EXPECT_EQ(cross_entropy_chunk(3 * kMost, 32000, 2), kMost);
  EXPECT_EQ(cross_entropy_chunk(1000, int64_t{1} << 30, 4), 63);  // 16 chunks of at most 64 rows
}

TEST_F(OpsOnAGpu, AdamWIsTheCpus) {
  const AdamWStep step = {.learning_rate = 1e-2, .weight_decay = 0.1, .grad_scale = 0.7, .count = 5};
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t count : {1, 1000, 200001}) {
      const at::Tensor gradient = random({count}).to(dtype);
      const at::Tensor start = random({count});
      std::vector<Tensors> results;
      Tensors moments = {random({count}, 0.01).to(at::kFloat), random({count}, 0.01).pow(2).to(at::kFloat)};
      for (const at::DeviceType device : devices()) {
        const Master master = Master::of(at::empty({count}, at::TensorOptions(device).dtype(dtype)));
        master.assign(start);
        const at::Tensor m = moments[0].to(device, at::kFloat, false, /*copy=*/true),
                         v = moments[1].to(device, at::kFloat, false, /*copy=*/true);
        adamw_update(master, m, v, gradient.to(device), step);
        results.push_back({master.values().cpu(), m.cpu(), v.cpu(), master.weight.cpu()});
      }
      const std::array<double, 3> tolerance = {1e-7, 1e-8, 1e-10};
      for (size_t i = 0; i < 3; ++i)
        EXPECT_TRUE(at::allclose(results[1][i], results[0][i], 2e-6, tolerance[i])) << i << " of " << count;
      EXPECT_TRUE(is_nearest(results[1][3], results[1][0]));
    }
  }
}

TEST_F(OpsOnAGpu, AdamWIn8BitsWithoutMasterIsTheCpus) {
  const AdamWStep step = {.learning_rate = 1e-3, .weight_decay = 0.1, .count = 1};
  const at::Tensor weight = random({5000}).to(at::kBFloat16), gradient = random({5000}).to(at::kBFloat16);
  Tensors results;
  for (const at::DeviceType device : devices()) {
    const at::Tensor w = weight.to(device, at::kBFloat16, /*non_blocking=*/false, /*copy=*/true);
    const Moment m = zero_moment(w, true), v = zero_moment(w, true);
    for (int i = 0; i < 3; ++i)
      adamw_update_compact({w, {}}, m, v, gradient.to(device), step, {.key = 5, .first = 9});
    results.push_back(w.to(at::kCPU, at::kDouble));
  }
  // A last bit here and there rounds another way.
  EXPECT_LE((results[0] != results[1]).sum().item<int64_t>(), 50);
  EXPECT_LT(error(results[1], results[0]), 1e-2);
}

TEST_F(OpsOnAGpu, PatchesAreTheCpus) {
  const at::Tensor pixels = at::randint(0, 256, {2, 3, 30, 30}, at::kByte);
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor weight = random({16, 3, 14, 14}).to(dtype);
    const at::Tensor expected = embed_patches(pixels, ImageSpec{}, weight, {});
    const at::Tensor got = embed_patches(pixels.to(at::kCUDA), ImageSpec{}, weight.to(at::kCUDA), {});
    EXPECT_LT(error(got, expected.to(at::kDouble)), dtype == at::kFloat ? 1e-5 : 2e-2);
  }
}

TEST(Ops, RecomputeRunsTheBlockAgainAndChangesNoBit) {
  int runs = 0;
  const at::Tensor weight = random({8, 8}).to(at::kFloat).set_requires_grad(true), frozen = at::ones({8});
  const auto block = [&](const at::Tensor& x, bool) {
    ++runs;
    return at::gelu(rms_norm(x, frozen, 1e-5).mm(weight));
  };
  const at::Tensor x = random({5, 8}).to(at::kFloat).set_requires_grad(true);
  const Tensors plain = torch::autograd::grad({block(x, true).sum()}, {x, weight});
  runs = 0;
  const at::Tensor y = recompute(block, x, {weight, frozen});
  EXPECT_EQ(runs, 1);
  const Tensors again = torch::autograd::grad({y.sum()}, {x, weight});
  EXPECT_EQ(runs, 2);
  EXPECT_TRUE(at::equal(plain[0], again[0]));
  EXPECT_TRUE(at::equal(plain[1], again[1]));
}

}  // namespace
}  // namespace caldera
