// affine_of: what it keeps for backward, and that its gradients are the plain composition's.
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "base/cpu_allocator.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"

namespace caldera {
namespace {

TEST(AffineOf, IsThePlainCompositionBitForBit) {
  at::manual_seed(0);
  const at::Tensor bias = at::randn({5}), dy = at::randn({9, 5});
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const bool has_bias : {false, true}) {
      for (const bool source_trains : {false, true}) {
        const auto leaf = [&](at::IntArrayRef shape, bool trains) {
          return at::randn(shape).to(dtype).set_requires_grad(trains);
        };
        const at::Tensor x = leaf({9, 16}, source_trains), norm = leaf({16}, true),
                         weight = leaf({5, 16}, true);
        const at::Tensor b = has_bias ? bias.to(dtype).clone().set_requires_grad(true) : at::Tensor();
        const auto normed = [&](const at::Tensor& source) { return rms_norm(source, norm, 1e-5); };
        std::vector<at::Tensor> inputs = {norm, weight};
        if (has_bias) inputs.push_back(b);
        if (source_trains) inputs.push_back(x);
        const at::Tensor plain = affine(normed(x), weight, b),
                         made_again = affine_of(normed, x, {norm}, weight, b);
        EXPECT_TRUE(at::equal(plain, made_again));
        const auto expected = torch::autograd::grad({plain}, inputs, {dy.to(dtype)});
        const auto got = torch::autograd::grad({made_again}, inputs, {dy.to(dtype)});
        for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(at::equal(got[i], expected[i])) << i;
      }
    }
  }
}

TEST(AffineOf, KeepsTheSourceAlone) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the arena, which counts, is off under sanitizers";
#endif
  use_caching_cpu_allocator();
  constexpr int64_t kRows = 4096, kWidth = 512;  // 8 MiB for the gated product
  const at::Tensor gate_up = at::randn({kRows, 2 * kWidth}).set_requires_grad(true);
  const at::Tensor weight = at::randn({64, kWidth}).set_requires_grad(true);
  const int64_t before = cpu_memory().live_bytes;
  const at::Tensor plain = affine(swiglu(gate_up), weight);
  const int64_t of_plain = cpu_memory().live_bytes - before;
  const at::Tensor made_again = affine_of(swiglu, gate_up, {}, weight);
  const int64_t of_made_again = cpu_memory().live_bytes - before - of_plain;
  EXPECT_EQ(of_plain - of_made_again, kRows * kWidth * 4);
}

}  // namespace
}  // namespace caldera
