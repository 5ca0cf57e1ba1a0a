// What the tests of operations share: each runs on the CPU and, where there is one, on a GPU.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>

#include "tests/aten.h"

namespace caldera {

using Tensors = std::vector<at::Tensor>;
using Operation = std::function<at::Tensor(const Tensors&)>;

inline bool has_gpu() { return at::hasCUDA() && at::detail::getCUDAHooks().deviceCount() > 0; }
inline std::vector<at::DeviceType> devices() {
  return has_gpu() ? std::vector{at::kCPU, at::kCUDA} : std::vector{at::kCPU};
}

inline at::Tensor random(at::IntArrayRef shape, double scale = 1) {
  static at::Generator generator = at::detail::createCPUGenerator(17);
  return at::randn(shape, generator, at::kDouble) * scale;
}

inline double error(const at::Tensor& got, const at::Tensor& expected) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  if (expected.numel() == 0) return 0;
  return ((got.to(at::kCPU, at::kDouble) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
      .item<double>();
}

// Runs `fast` in each dtype on each device and `plain` in double on the same (rounded) inputs; compares outputs and
// all gradients.
inline void expect_same(const Operation& fast, const Operation& plain, const Tensors& inputs,
                 double float_tolerance = 2e-6) {
  for (const auto& [dtype, tolerance] :
       {std::pair{at::kFloat, float_tolerance}, std::pair{at::kBFloat16, 2e-2}}) {
    Tensors doubles;
    for (const at::Tensor& input : inputs)
      doubles.push_back(input.to(dtype).to(at::kDouble).set_requires_grad(true));
    const at::Tensor expected = plain(doubles), upstream = random(expected.sizes()).to(dtype);
    const Tensors wanted = torch::autograd::grad({expected}, doubles, {upstream.to(at::kDouble)});
    for (const at::DeviceType device : devices()) {
      SCOPED_TRACE(testing::Message() << dtype << " on " << device);
      Tensors leaves;
      for (const at::Tensor& input : inputs) leaves.push_back(input.to(device, dtype).set_requires_grad(true));
      const at::Tensor got = fast(leaves);
      EXPECT_LT(error(got.detach(), expected.detach()), tolerance);
      const Tensors gradients = torch::autograd::grad({got}, leaves, {upstream.to(got.options())});
      for (size_t i = 0; i < inputs.size(); ++i)
        EXPECT_LT(error(gradients[i], wanted[i]), tolerance) << i;
    }
  }
}

}  // namespace caldera
