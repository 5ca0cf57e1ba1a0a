// What the tests of the CUDA kernels share: the emulated device's memory as tensors, and comparisons.
#pragma once
#include <gtest/gtest.h>

#include <cstring>

#include "tests/aten.h"
#include "tests/model/cuda_on_cpu.h"
#include "tests/model/operations.h"  // random()

namespace caldera {

namespace kernels = kernels_on_cpu;
using cuda_on_cpu::Buffer;
using cuda_on_cpu::Order;
using kernels::Bf16;
using Tensors = std::vector<at::Tensor>;

template <class T>
constexpr at::ScalarType kDtype = at::kFloat;
template <>
constexpr at::ScalarType kDtype<Bf16> = at::kBFloat16;
template <>
constexpr at::ScalarType kDtype<int64_t> = at::kLong;
template <>
constexpr at::ScalarType kDtype<uint8_t> = at::kByte;
template <>
constexpr at::ScalarType kDtype<int16_t> = at::kShort;

// A tensor in the emulated device's memory.
template <class T>
class Device {
 public:
  explicit Device(const at::Tensor& x, size_t elements_behind = 0)
      : shape_(x.sizes().vec()), buffer_(static_cast<size_t>(x.numel()), elements_behind) {
    const at::Tensor dense = x.detach().to(kDtype<T>).contiguous();
    std::memcpy(buffer_.data(), dense.const_data_ptr(), buffer_.num_bytes());
  }
  // Nothing was written there yet.
  explicit Device(std::vector<int64_t> shape, size_t elements_behind = 0)
      : shape_(std::move(shape)),
        buffer_(static_cast<size_t>(c10::multiply_integers(shape_)), elements_behind) {}

  T* operator*() { return buffer_.data(); }
  at::Tensor tensor() {
    EXPECT_TRUE(buffer_.guards_are_whole()) << "written beyond the tensor";
    at::Tensor x = at::empty(shape_, kDtype<T>);
    std::memcpy(x.mutable_data_ptr(), buffer_.data(), buffer_.num_bytes());
    return x;
  }

 private:
  std::vector<int64_t> shape_;
  Buffer<T> buffer_;
};

// What `run` returns, which must be the same bits in both orders.
inline Tensors in_both_orders(const std::function<Tensors()>& run) {
  cuda_on_cpu::order = Order::kAscending;
  const Tensors results = run();
  cuda_on_cpu::order = Order::kDescending;
  const Tensors others = run();
  cuda_on_cpu::order = Order::kAscending;
  for (size_t i = 0; i < results.size(); ++i)
    EXPECT_TRUE(at::allclose(results[i], others[i], 0, 0, /*equal_nan=*/true))
        << "result " << i << " depends on the order of the threads";
  return results;
}

// To `tolerance` of the largest value, or of 1; in bfloat16 also to half a unit in the last place of each
// value, or to a whole one where the expected values were rounded too.
inline void expect_close(const at::Tensor& got, const at::Tensor& expected, double tolerance = 3e-6) {
  ASSERT_EQ(got.sizes(), expected.sizes());
  const at::Tensor wanted = expected.to(at::kDouble), difference = (got.to(at::kDouble) - wanted).abs();
  const double rounding = got.scalar_type() != at::kBFloat16        ? 0
                          : expected.scalar_type() == at::kBFloat16 ? 0x1p-7
                                                                    : 0x1p-8;
  const at::Tensor bound = wanted.abs().max().clamp_min(1) * tolerance + wanted.abs() * rounding;
  EXPECT_TRUE((difference <= bound).all().item<bool>())
      << "off by up to " << difference.max().item<double>() << " of " << wanted.abs().max().item<double>();
}
inline void expect_close(const Tensors& got, const Tensors& expected, double tolerance = 3e-6) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    SCOPED_TRACE(i);
    expect_close(got[i], expected[i], tolerance);
  }
}

template <class T>
class CudaKernels : public testing::Test {
 protected:
  static at::Tensor rounded(const at::Tensor& x) { return x.to(kDtype<T>).to(at::kDouble); }
};
using Dtypes = testing::Types<float, Bf16>;

}  // namespace caldera
