// The CUDA kernels' own source, compiled for the CPU and run thread by thread (cuda_on_cpu.h), against plain
// ATen in double and against the CPU's operations. Every kernel runs twice, with its threads in either order.
#include <gmock/gmock.h>
#include <torch/csrc/autograd/autograd.h>

#include <array>

#include "model/ops/noise.h"
#include "model/ops/ops.h"
#include "tests/aten.h"
#include "tests/model/cuda_kernels.h"
// In this order: what the kernels need of CUDA stands above.
#include "model/ops/cuda/activations.cu"
#include "model/ops/cuda/cross_entropy.cu"
#include "model/ops/cuda/patches.cu"
#include "model/ops/cuda/rms_norm.cu"
#include "model/ops/cuda/rotary.cu"

namespace caldera {
namespace {

// f(inputs) and its gradients with respect to all inputs, from the upstream gradient.
Tensors with_gradients(const std::function<at::Tensor(const Tensors&)>& f, const Tensors& inputs,
                       const at::Tensor& upstream, at::ScalarType dtype) {
  Tensors leaves;
  for (const at::Tensor& input : inputs) leaves.push_back(input.to(dtype).detach().set_requires_grad(true));
  const at::Tensor y = f(leaves);
  Tensors results = torch::autograd::grad({y}, leaves, {upstream.to(dtype)});
  results.insert(results.begin(), y.detach());
  return results;
}

TYPED_TEST_SUITE(CudaKernels, Dtypes);

TYPED_TEST(CudaKernels, RmsNorm) {
  using T = TypeParam;
  // Rows that fill a block of eight, and do not; widths of whole packs, of single elements, beyond a pass of
  // a block.
  for (const auto& [rows, width] : {std::pair{1, 576}, {19, 37}, {8, 16}, {41, 2056}, {150, 5}, {3, 2049}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << width);
    const auto some = [&] { return this->rounded(random({rows, width})); };
    const at::Tensor x = some(), update = some(), dy = some(), d_residual = some(), weight = this->rounded(random({width}));
    // With `adds` the sum x + update is normed, and goes on: its gradient is added.
    const auto run = [&](bool adds, bool wants_dweight) -> Tensors {
      const int64_t parts = (rows + kernels::kRmsNormRows - 1) / kernels::kRmsNormRows;
      Device<T> x_(x), update_(update), weight_(weight), dy_(dy), d_residual_(d_residual), sum({rows, width}),
          y({rows, width}), dx({rows, width});
      Device<float> rstd({rows}), dweight({parts, width});
      kernels::rms_norm_forward<T>(*x_, adds ? *update_ : nullptr, *weight_, adds ? *sum : nullptr, *y, *rstd, rows, width,
                                   1e-5f, nullptr);
      kernels::rms_norm_backward<T>(adds ? *sum : *x_, *weight_, *rstd, *dy_, adds ? *d_residual_ : nullptr, *dx,
                                    wants_dweight ? *dweight : nullptr, rows, width, nullptr);
      Tensors results = {y.tensor(), dx.tensor()};
      if (wants_dweight) results.push_back(dweight.tensor().sum(0).to(kDtype<T>));
      if (adds) results.push_back(sum.tensor());
      return results;
    };
    const auto plain = [](const Tensors& t) {
      return t[0] * (t[0].pow(2).mean(-1, true) + 1e-5).rsqrt() * t[1];
    };
    const auto on_cpu = [](const Tensors& t) { return rms_norm(t[0], t[1], 1e-5); };
    const Tensors got = in_both_orders([&] { return run(false, true); });
    expect_close(got, with_gradients(plain, {x, weight}, dy, at::kDouble));
    expect_close(got, with_gradients(on_cpu, {x, weight}, dy, kDtype<T>));
    const Tensors frozen = in_both_orders([&] { return run(false, false); });
    EXPECT_TRUE(at::equal(frozen[1], got[1]));

    const Tensors added = in_both_orders([&] { return run(true, true); });
    const at::Tensor sum = (x.to(kDtype<T>) + update.to(kDtype<T>)).to(at::kDouble);
    EXPECT_TRUE(at::equal(added[3].to(at::kDouble), sum));
    Tensors in_double = with_gradients(plain, {sum, weight}, dy, at::kDouble);
    in_double[1] = in_double[1] + d_residual;
    expect_close({added[0], added[1], added[2]}, in_double);
    const at::Tensor leaf = sum.to(kDtype<T>).requires_grad_(), weight_leaf = weight.to(kDtype<T>).requires_grad_();
    const auto [value, residual] = add_rms_norm(leaf, {}, weight_leaf, 1e-5);
    const Tensors gradients = torch::autograd::grad({value, residual}, {leaf, weight_leaf},
                                                    {dy.to(kDtype<T>), d_residual.to(kDtype<T>)});
    expect_close({added[0], added[1], added[2]}, {value.detach(), gradients[0], gradients[1]});
  }
}

TYPED_TEST(CudaKernels, Dropout) {
  using T = TypeParam;
  for (const int64_t width : {1, 1000, 4099}) {
    const at::Tensor x = this->rounded(random({3, width})).to(kDtype<T>);
    const at::Tensor keys = at::tensor({int64_t{5}, int64_t{-7}, int64_t{1} << 40}, at::kLong);
    const at::Tensor got = in_both_orders([&]() -> Tensors {
      Device<T> x_(x), y({3, width});
      kernels::dropout(*x_, *y, keys.const_data_ptr<int64_t>(), 9, 3, width,
                       static_cast<uint32_t>(std::lround(0.25 * 0x1p32)), 1 / 0.75f, nullptr);
      return {y.tensor()};
    })[0];
    EXPECT_TRUE(at::equal(got, dropped_out(x, {0.25, keys}, 9)));
  }
}

TYPED_TEST(CudaKernels, Rotary) {
  using T = TypeParam;
  struct Case {
    int64_t rows, heads, width, stride;
  };
  // Rows of a wider projection, at and off multiples of 16 bytes; halves that are no whole packs.
  for (const Case c :
       {Case{5, 3, 64, 192}, {7, 9, 128, 1536}, {3, 2, 6, 12}, {1, 40, 32, 1283}, {4, 1, 20, 20}}) {
    SCOPED_TRACE(testing::Message() << c.rows << " x " << c.heads << " x " << c.width << ", " << c.stride);
    const at::Tensor inv_freq =
        1.0 / at::pow(100.0, at::arange(0, c.width, 2).to(at::kFloat) / static_cast<double>(c.width));
    const Rotary rotary = rotary_tables(inv_freq, at::arange(3, 3 + c.rows), 1.1, at::kFloat);
    const at::Tensor storage = this->rounded(random({c.rows * c.stride}));
    const at::Tensor x = storage.as_strided({c.rows, c.heads, c.width}, {c.stride, c.width, 1});
    const auto turn = [&](const at::Tensor& from, float sign) {
      return in_both_orders([&]() -> Tensors {
        Device<T> x_(from), y({c.rows, c.heads, c.width}), wide(at::zeros({c.rows * c.stride}));
        Device<float> cos(rotary.cos_TK), sin(rotary.sin_TK);
        const int64_t dense = c.heads * c.width, stride = from.dim() == 1 ? c.stride : dense;
        kernels::rotate(*x_, stride, *cos, *sin, sign, *y, dense, c.rows, c.heads, c.width, nullptr);
        // Into rows that are wider: what lies between stays as it was.
        kernels::rotate(*x_, stride, *cos, *sin, sign, *wide, c.stride, c.rows, c.heads, c.width, nullptr);
        const at::Tensor rows = wide.tensor().view({c.rows, c.stride});
        EXPECT_TRUE(at::equal(rows.narrow(1, 0, dense), y.tensor().view({c.rows, dense})));
        const at::Tensor between = rows.narrow(1, dense, c.stride - dense);
        EXPECT_TRUE(at::equal(between, at::zeros_like(between)));
        return {y.tensor()};
      })[0];
    };
    const auto plain = [&](const Tensors& t) {
      const at::Tensor turned =
          at::cat({-t[0].narrow(2, c.width / 2, c.width / 2), t[0].narrow(2, 0, c.width / 2)}, -1);
      return t[0] * rotary.cos_TK.unsqueeze(1) + turned * rotary.sin_TK.unsqueeze(1);
    };
    const auto on_cpu = [&](const Tensors& t) { return apply_rotary(t[0], rotary); };
    const at::Tensor dy = this->rounded(random({c.rows, c.heads, c.width}));
    const Tensors got = {turn(storage, 1), turn(dy, -1)};
    expect_close(got, with_gradients(plain, {x}, dy, at::kDouble));
    expect_close(got, with_gradients(on_cpu, {x}, dy, kDtype<T>));
  }
}

TYPED_TEST(CudaKernels, Swiglu) {
  using T = TypeParam;
  for (const auto& [rows, width] : {std::pair{1, 96}, {13, 19}, {3, 2064}, {2, 1001}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << width);
    at::Tensor gate_up = this->rounded(random({rows, 2 * width}, 3));
    gate_up[0][0] = -500;  // far out on both sides nothing overflows
    gate_up[0][1] = 500;
    const at::Tensor dy = this->rounded(random({rows, width}));
    const Tensors got = in_both_orders([&]() -> Tensors {
      Device<T> x(gate_up), dy_(dy), y({rows, width}), dx({rows, 2 * width});
      kernels::swiglu_forward(*x, *y, rows, width, nullptr);
      kernels::swiglu_backward(*x, *dy_, *dx, rows, width, nullptr);
      return {y.tensor(), dx.tensor()};
    });
    const auto plain = [](const Tensors& t) {
      const auto halves = t[0].chunk(2, -1);
      return halves[0] * halves[0].sigmoid() * halves[1];
    };
    const auto on_cpu = [](const Tensors& t) { return swiglu(t[0]); };
    expect_close(got, with_gradients(plain, {gate_up}, dy, at::kDouble));
    expect_close(got, with_gradients(on_cpu, {gate_up}, dy, kDtype<T>));
  }
}

TYPED_TEST(CudaKernels, QuickGeluAlsoInPlace) {
  using T = TypeParam;
  for (const int64_t count : {1, 7, 2048, 4104, 3001}) {
    const at::Tensor x = this->rounded(random({count}, 3)), dy = this->rounded(random({count}));
    const Tensors got = in_both_orders([&]() -> Tensors {
      Device<T> x_(x), dy_(dy), y({count}), in_place(x);
      kernels::quick_gelu_forward(*x_, *y, count, nullptr);
      kernels::quick_gelu_forward(*in_place, *in_place, count, nullptr);
      kernels::quick_gelu_backward(*x_, *dy_, *dy_, count, nullptr);
      EXPECT_TRUE(at::equal(in_place.tensor(), y.tensor()));
      return {y.tensor(), dy_.tensor()};
    });
    const auto plain = [](const Tensors& t) { return t[0] * (t[0] * 1.702).sigmoid(); };
    expect_close(got, with_gradients(plain, {x}, dy, at::kDouble));
  }
}

TYPED_TEST(CudaKernels, CrossEntropy) {
  using T = TypeParam;
  for (const auto& [rows, vocab] : {std::pair{1, 32}, {5, 91}, {3, 8192}, {2, 5003}}) {
    SCOPED_TRACE(testing::Message() << rows << " x " << vocab);
    at::Tensor logits = this->rounded(random({rows, vocab}, 4));
    logits[0][0] = this->rounded(logits.max() + 6);  // p is almost 1 there
    logits[rows - 1].narrow(0, 1, 7).fill_(-std::numeric_limits<double>::infinity());
    at::Tensor targets = at::randint(8, vocab, {rows}, at::kLong);
    targets[0] = 0;
    const auto run = [&](bool gradient) {
      return in_both_orders([&]() -> Tensors {
        Device<T> x(logits);
        Device<int64_t> targets_(targets);
        Device<float> nll({rows});
        kernels::cross_entropy(*x, *targets_, *nll, rows, vocab, gradient, 0.75f, nullptr);
        return {nll.tensor(), x.tensor()};
      });
    };
    const Tensors got = run(true), without = run(false);
    const at::Tensor log_p = logits.log_softmax(-1), index = targets.unsqueeze(1);
    const at::Tensor nll = -log_p.gather(1, index).squeeze(1);
    expect_close(got[0], nll);
    EXPECT_TRUE(at::equal(without[0], got[0]));
    EXPECT_TRUE(at::equal(without[1], logits.to(kDtype<T>)));
    at::Tensor gradient = log_p.exp();
    gradient.scatter_(1, index, nll.neg().expm1().unsqueeze(1)).mul_(0.75);
    expect_close(got[1], gradient);
    const at::Tensor surest = got[1][0][0].to(at::kDouble), expected = gradient[0][0];
    EXPECT_LE((surest - expected).abs().item<double>(), 2e-2 * expected.abs().item<double>());
    if (vocab > 100) continue;
    // The CPU's kernel on the same logits.
    const at::Tensor leaf = logits.to(kDtype<T>).nan_to_num(std::nullopt, std::nullopt, -1e4);
    expect_close(got[0], linear_nll(leaf, at::eye(vocab, kDtype<T>), targets), 1e-5);
  }
}

TYPED_TEST(CudaKernels, CrossEntropyOfATargetBeyondTheVocabularyIsNotANumber) {
  using T = TypeParam;
  const Tensors got = in_both_orders([&]() -> Tensors {
    Device<T> logits(random({3, 40}));
    Device<int64_t> targets(at::tensor({40, -1, 39}, at::kLong));
    Device<float> nll({3});
    kernels::cross_entropy(*logits, *targets, *nll, 3, 40, true, 1.0f, nullptr);
    logits.tensor();
    return {nll.tensor().isnan().to(at::kLong)};
  });
  EXPECT_TRUE(at::equal(got[0], at::tensor({1, 1, 0}, at::kLong)));
}

TYPED_TEST(CudaKernels, NotANumberStaysVisible) {
  using T = TypeParam;
  const at::Tensor nan = at::full({2, 32}, std::numeric_limits<double>::quiet_NaN());
  Device<T> x(nan), weight(at::ones({32})), y({2, 32}), half({2, 16}), gelu({2, 32});
  Device<float> rstd({2}), nll({2});
  Device<int64_t> targets(at::zeros({2}, at::kLong));
  kernels::rms_norm_forward<T>(*x, nullptr, *weight, nullptr, *y, *rstd, 2, 32, 1e-5f, nullptr);
  kernels::swiglu_forward(*x, *half, 2, 16, nullptr);
  kernels::quick_gelu_forward(*x, *gelu, 64, nullptr);
  kernels::cross_entropy(*x, *targets, *nll, 2, 32, false, 1.0f, nullptr);
  for (const at::Tensor& result : {y.tensor(), half.tensor(), gelu.tensor(), nll.tensor()})
    EXPECT_TRUE(result.isnan().all().item<bool>());
}

TYPED_TEST(CudaKernels, NormalizedPatches) {
  using T = TypeParam;
  const std::array<float, 3> scale = {0.01f, 0.02f, 0.03f}, shift = {-1.5f, -2.0f, 0.5f};
  // With and without pixels left over at the edges; patches larger than a block.
  for (const auto& [images, size, patch] : {std::tuple{2, 28, 14}, {1, 30, 14}, {3, 8, 4}, {1, 33, 32}}) {
    const int64_t grid = size / patch;
    const at::Tensor pixels = at::randint(0, 256, {images, 3, size, size}, at::kByte);
    const Tensors got = in_both_orders([&]() -> Tensors {
      Device<uint8_t> pixels_(pixels);
      Device<T> patches({images, grid * grid, 3 * patch * patch});
      kernels::normalized_patches(*pixels_, *patches, images, size, patch, scale, shift, nullptr);
      return {patches.tensor()};
    });
    const auto per_channel = [](const std::array<float, 3>& values) {
      return at::tensor(at::ArrayRef<float>(values)).to(at::kDouble).view({1, 3, 1, 1});
    };
    const at::Tensor plain = (pixels.to(at::kDouble) * per_channel(scale) + per_channel(shift))
                                 .narrow(2, 0, grid * patch)
                                 .narrow(3, 0, grid * patch)
                                 .reshape({images, 3, grid, patch, grid, patch})
                                 .permute({0, 2, 4, 1, 3, 5})
                                 .reshape({images, grid * grid, 3 * patch * patch});
    expect_close(got[0], plain, 1e-6);
  }
}

TYPED_TEST(CudaKernels, NoRowsIsNoLaunch) {
  using T = TypeParam;
  kernels::rms_norm_forward<T>(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 64, 1e-5f, nullptr);
  kernels::swiglu_forward<T>(nullptr, nullptr, 0, 64, nullptr);
  kernels::cross_entropy<T>(nullptr, nullptr, nullptr, 0, 64, true, 1.0f, nullptr);
}

TEST(CudaPrimitives, RoundToNearestEvenAsC10Does) {
  // Every sign, exponent and the first bits of the fraction, at and beside the middle between two values.
  for (uint32_t high = 0; high < 0x10000; ++high) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      const float x = std::bit_cast<float>(high << 16 | low);
      const auto got = static_cast<uint16_t>(kernels::round_pair(0, x) >> 16);
      if (std::isnan(x))
        ASSERT_TRUE(std::isnan(std::bit_cast<float>(uint32_t{got} << 16)));
      else
        ASSERT_EQ(got, c10::BFloat16(x).x) << x;
    }
  }
}

// Kernels with a fault each: what the tests above rely on is seen.
void writes_beyond(float* x) { kernels::store(x + threadIdx.x, kernels::Floats<1>{1}); }
void loads_askew(float* x) { kernels::load<4>(x + threadIdx.x); }
void leaves_others_waiting(float*) {
  if (threadIdx.x < 7) return;
  __syncthreads();
}
void shuffles_half_a_warp(float*) {
  if (threadIdx.x % 2) __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 2);
}
void reads_before_all_have_written(float* x) {
  __shared__ float slot[kernels::kThreads];
  slot[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = slot[(threadIdx.x + 1) % kernels::kThreads];
  __syncthreads();
  slot[threadIdx.x] = -1;
}

TEST(CudaOnCpu, SeesFaults) {
  Device<float> x({255});
  const auto message = [&](void (*kernel)(float*)) -> std::string {
    try {
      kernels::launch("", kernel, 1, nullptr, *x);
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "no fault";
  };
  EXPECT_THAT(message(writes_beyond), testing::HasSubstr("beyond the memory"));
  EXPECT_THAT(message(loads_askew), testing::HasSubstr("not aligned"));
  EXPECT_THAT(message(leaves_others_waiting), testing::HasSubstr("do not come"));
  EXPECT_THAT(message(shuffles_half_a_warp), testing::HasSubstr("do not come"));
}

TEST(CudaOnCpu, AMissingBarrierShowsInTheOrders) {
  Tensors results;
  for (const Order order : {Order::kAscending, Order::kDescending}) {
    cuda_on_cpu::order = order;
    Device<float> x(at::arange(static_cast<int64_t>(kernels::kThreads)));
    kernels::launch("", reads_before_all_have_written, 1, nullptr, *x);
    results.push_back(x.tensor());
  }
  cuda_on_cpu::order = Order::kAscending;
  EXPECT_FALSE(at::equal(results[0], results[1]));
}

}  // namespace
}  // namespace caldera
