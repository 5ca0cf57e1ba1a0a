// affine_of and recompute: what they keep for backward, what they compute there, and that gradients are the plain
// composition's.
#include <c10/core/CachingDeviceAllocator.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "base/cpu_allocator.h"
#include "base/error.h"
#include "model/ops/host_copies.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"
#include "tests/aten.h"
#include "tests/model/operations.h"

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
        // Alone; with a residual that goes on; with an update that is added before.
        for (const bool has_update : {false, true}) {
          const at::Tensor update = has_update ? leaf({9, 16}, source_trains) : at::Tensor();
          std::vector<at::Tensor> inputs = {norm, weight};
          if (has_bias) inputs.push_back(b);
          if (source_trains) inputs.push_back(x);
          if (source_trains && has_update) inputs.push_back(update);
          for (const bool goes_on : {false, true}) {
            const auto [value, residual] = add_rms_norm(x, update, norm, 1e-5);
            const at::Tensor plain = affine(value, weight, b);
            const auto [made_again, beside] = affine_of_norm(x, update, norm, 1e-5, weight, b);
            EXPECT_TRUE(at::equal(plain, made_again));
            EXPECT_TRUE(at::equal(residual, beside));
            std::vector<at::Tensor> upstream = {dy.to(dtype)}, of_plain = {plain}, of_made_again = {made_again};
            if (goes_on) {
              upstream.push_back(at::cos(residual.detach()));
              of_plain.push_back(residual);
              of_made_again.push_back(beside);
            }
            const auto expected = torch::autograd::grad(of_plain, inputs, upstream);
            const auto got = torch::autograd::grad(of_made_again, inputs, upstream);
            for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(at::equal(got[i], expected[i])) << i;
          }
        }
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
  const at::Tensor made_again = affine_of(swiglu, gate_up, weight);
  const int64_t of_made_again = cpu_memory().live_bytes - before - of_plain;
  EXPECT_EQ(of_plain - of_made_again, kRows * kWidth * 4);
}

// In backward the graph alone is wanted: the gradients are the same where the last product is left out.
TEST(Recompute, LeavesOutALastProductInBackward) {
  at::manual_seed(0);
  const at::Tensor x = at::randn({9, 16}).set_requires_grad(true), dy = at::randn({9, 16});
  for (const bool weight_trains : {false, true}) {
    const at::Tensor weight = at::randn({16, 16}).set_requires_grad(weight_trains), norm = at::ones({16});
    std::vector<at::Tensor> inputs = {x};
    if (weight_trains) inputs.push_back(weight);
    const auto activate = [](const at::Tensor& source) { return source.tanh(); };
    std::vector<bool> needed;
    const auto block = [&](const at::Tensor& source, bool needs_value) {
      needed.push_back(needs_value);
      const at::Tensor first = affine(source.sin(), weight);
      const auto [value, sum] = affine_of_norm(source, first, norm, 1e-5, weight);
      return sum + affine_of(activate, value, weight, {}, needs_value) + affine(value, weight, {}, needs_value);
    };
    const at::Tensor plain = block(x, true), made_again = recompute(block, x, {weight});
    EXPECT_TRUE(at::equal(plain, made_again));
    const auto expected = torch::autograd::grad({plain}, inputs, {dy});
    const auto got = torch::autograd::grad({made_again}, inputs, {dy});
    for (size_t i = 0; i < inputs.size(); ++i) EXPECT_TRUE(at::equal(got[i], expected[i])) << i;
    EXPECT_EQ(needed, (std::vector<bool>{true, true, false}));
  }
}

// Three blocks in a row whose inputs wait in host memory, on each device; the memory of each is free for others meanwhile.
TEST(Recompute, InputsComeBackFromHostMemory) {
  for (const at::DeviceType device : devices()) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(testing::Message() << dtype << " on " << device);
      const at::Tensor x = random({257, 33}).to(device, dtype), weight = random({33, 33}, 0.2).to(device, dtype);
      const auto block = [&](const at::Tensor& input, bool) { return affine(input.sin(), weight); };
      const auto gradients = [&](const std::shared_ptr<HostCopies>& host) {
        const at::Tensor leaf = x.detach().clone().requires_grad_();
        at::Tensor y = leaf;
        for (int i = 0; i < 3; ++i) {
          y = recompute(block, y, {weight}, {}, host);
          at::full_like(y, 7);  // takes the place of what was let go of
        }
        return torch::autograd::grad({y}, {leaf, weight}, {at::ones_like(y)});
      };
      weight.requires_grad_();
      const auto expected = gradients(nullptr), got = gradients(std::make_shared<HostCopies>());
      for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(at::equal(got[i], expected[i])) << i;
    }
  }
}

// On a GPU: of ten tensors that are put and let go of one stays there, and one more while they are taken.
TEST(HostCopies, HoldOneTensorOfTheGpusMemory) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU here (or a build without CUDA)";
  constexpr int64_t kCount = 4 << 20, kBytes = kCount * 4;
  const at::Device device(at::kCUDA, 0);
  c10::DeviceAllocator* allocator = at::getDeviceAllocator(at::kCUDA);
  const auto peak = [&] { return allocator->getDeviceStats(0).allocated_bytes[0].peak; };
  at::ones({1}, at::TensorOptions(device));
  allocator->resetPeakStats(0);
  const int64_t before = peak();
  HostCopies copies;
  at::Tensor x = at::ones({kCount}, at::TensorOptions(device).dtype(at::kFloat));
  for (int i = 0; i < 10; ++i) {
    copies.put(x);
    x = x + 1;
  }
  x.reset();
  for (size_t i = 10; i-- > 0;) EXPECT_EQ(copies.take(i).sum().item<double>(), static_cast<double>((i + 1) * kCount));
  EXPECT_LE(peak() - before, 4 * kBytes);
}

TEST(HostCopies, GiveBackEachTensorOnItsDevice) {
  for (const at::DeviceType device : devices()) {
    HostCopies copies;
    std::vector<at::Tensor> tensors;
    for (int64_t i = 0; i < 5; ++i) {
      tensors.push_back(random({100 + i, 3}).to(device, at::kFloat));
      const at::Tensor passing = tensors.back().clone();
      EXPECT_EQ(copies.put(passing), static_cast<size_t>(i));
      passing.clone().zero_();
    }
    for (size_t i = 5; i-- > 0;) {
      const at::Tensor back = copies.take(i);
      EXPECT_EQ(back.device(), tensors[i].device());
      EXPECT_TRUE(at::equal(back, tensors[i])) << i;
    }
    EXPECT_THROW(copies.take(2), Error);  // a second time
    EXPECT_THROW(copies.take(5), Error);
  }
}

}  // namespace
}  // namespace caldera
