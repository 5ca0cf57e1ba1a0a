// The CUDA kernels of AdamW, run on the CPU (cuda_on_cpu.h), against the CPU's own.
#include <array>

#include "model/ops/adamw_compact.h"
#include "model/ops/adamw_math.h"
#include "model/ops/dynamic_map.h"
#include "model/ops/noise.h"
#include "tests/model/cuda_kernels.h"
#include "tests/support.h"
// In this order: what the kernels need of CUDA stands above.
#include "model/ops/cuda/adamw.cu"

namespace caldera {
namespace {

template <class T>
class CudaAdamW : public CudaKernels<T> {};
TYPED_TEST_SUITE(CudaAdamW, Dtypes);

TYPED_TEST(CudaAdamW, AdamW) {
  using T = TypeParam;  // of the gradient
  const AdamWStep step = {
      .learning_rate = 1e-2, .beta2 = 0.98, .weight_decay = 0.1, .grad_scale = 0.7, .count = 5};
  const kernels::AdamWFactors factors = {
      .decay = 1 - 1e-2f * 0.1f,
      .one_minus_beta1 = 0.1f,
      .beta2 = 0.98f,
      .one_minus_beta2 = 0.02f,
      .step_size = static_cast<float>(1e-2 / (1 - std::pow(0.9, 5))),
      .inverse_correction2 = static_cast<float>(1 / std::sqrt(1 - std::pow(0.98, 5))),
      .epsilon = 1e-8f,
      .grad_scale = 0.7f};
  // A part of a tensor, as a rank may own it, begins anywhere.
  for (const auto& [count, behind] :
       {std::pair<int64_t, size_t>{1, 0}, {1000, 0}, {1000, 1}, {4104, 0}, {2050, 3}}) {
    for (const bool has_gradient : {true, false}) {
      SCOPED_TRACE(testing::Message()
                   << count << " from " << behind << (has_gradient ? "" : ", no gradient"));
      const at::Tensor master = random({count}).to(at::kFloat), m = random({count}, 0.01).to(at::kFloat),
                       v = random({count}, 0.01).pow(2).to(at::kFloat),
                       gradient = random({count}).to(kDtype<T>);
      const Tensors got = in_both_orders([&]() -> Tensors {
        Device<float> master_(master, behind), m_(m, behind), v_(v, behind);
        Device<T> gradient_(gradient, behind);
        kernels::adamw({.whole = *master_}, *m_, *v_, has_gradient ? *gradient_ : nullptr, count, factors, nullptr);
        EXPECT_TRUE(at::equal(gradient_.tensor(), gradient));
        const Master split = Master::of(at::empty({count}, at::kBFloat16));
        split.assign(master);
        Device<Bf16> weight(split.weight, behind);
        Device<int16_t> remainder(split.remainder, behind);
        Device<float> m_too(m, behind), v_too(v, behind);
        kernels::adamw({.weight = *weight, .remainder = *remainder}, *m_too, *v_too,
                       has_gradient ? *gradient_ : nullptr, count, factors, nullptr);
        EXPECT_TRUE(is_nearest(weight.tensor(), master_.tensor()));
        EXPECT_TRUE(at::equal(Master{weight.tensor(), remainder.tensor()}.values(), master_.tensor()));
        return {master_.tensor(), m_.tensor(), v_.tensor()};
      });
      const Tensors expected = {master.clone(), m.clone(), v.clone()};
      adamw_update(Master::of(expected[0]), expected[1], expected[2], has_gradient ? gradient : at::Tensor(), step);
      const std::array<double, 3> tolerance = {1e-7, 1e-8, 1e-10};
      for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(at::allclose(got[i], expected[i], 2e-6, tolerance[i])) << i;
    }
  }
}

// The same update by the CPU and by the kernel, from random moments. The two differ in a last bit here and
// there, which now and then makes another code, or rounds another way.
TYPED_TEST(CudaAdamW, AdamWOfMomentsIn8BitsAndWeightsWithoutMaster) {
  using T = TypeParam;  // of the gradient
  const AdamWStep step = {
      .learning_rate = 1e-3, .beta2 = 0.98, .weight_decay = 0.1, .grad_scale = 0.7, .count = 5};
  const AdamWFactors f(step);
  const kernels::AdamWFactors factors = {f.decay,     f.one_minus_beta1,     f.beta2,   f.one_minus_beta2,
                                         f.step_size, f.inverse_correction2, f.epsilon, f.grad_scale};
  const RoundingNoise noise = {.key = 77, .first = 123456};
  const kernels::CompactNoise words = {noise_words(noise.key), static_cast<uint32_t>(noise.first)};
  const CodeTables tables = code_tables();
  // Whole ranges of 256, less than one, one element at a time, several blocks.
  for (const int64_t count : {256, 100, 99, 64 * 256 + 300}) {
    for (const auto& [is_8bit, has_master, has_gradient] :
         {std::tuple{true, true, true}, {true, false, true}, {false, false, true}, {true, true, false}}) {
      SCOPED_TRACE(testing::Message()
                   << count << (is_8bit ? ", 8 bits" : "") << (has_master ? ", master" : ""));
      const at::Tensor m_values = random({count}, 0.01).to(at::kFloat),
                       v_values = random({count}, 0.01).pow(2).to(at::kFloat),
                       weight = random({count}).to(at::kBFloat16), gradient = random({count}, 0.1).to(kDtype<T>);
      const auto moment = [&](const at::Tensor& values, bool is_signed) -> Moment {
        if (!is_8bit) return {values.clone(), {}};
        const Quantized quantized = quantize_dynamic(values, is_signed);
        return {quantized.codes.clone(), quantized.scale.clone()};
      };
      const auto values_of = [&](const at::Tensor& values, const at::Tensor& scale, bool is_signed) {
        return is_8bit ? dequantize_dynamic({values, scale}, is_signed) : values;
      };
      const Moment m = moment(m_values, true), v = moment(v_values, false);
      const Master master = has_master ? Master::of(weight.clone()) : Master{weight.clone(), {}};
      if (has_master) master.assign(random({count}));
      const Tensors got = in_both_orders([&]() -> Tensors {
        Device<float> m_(m.values), v_(v.values), m_scale(is_8bit ? m.scale : m.values),
            v_scale(is_8bit ? v.scale : v.values);
        Device<uint8_t> m_codes(m.values), v_codes(v.values);
        Device<T> gradient_(gradient);
        Device<Bf16> weight_(master.weight);
        Device<int16_t> remainder_(has_master ? master.remainder : at::zeros({count}, at::kShort));
        kernels::CompactState state = {
            .weights = {.weight = *weight_, .remainder = has_master ? *remainder_ : nullptr}};
        if (is_8bit) {
          state.exp_avg_codes = *m_codes;
          state.exp_avg_sq_codes = *v_codes;
          state.exp_avg_scale = *m_scale;
          state.exp_avg_sq_scale = *v_scale;
        } else {
          state.exp_avg = *m_;
          state.exp_avg_sq = *v_;
        }
        kernels::adamw_compact(state, has_gradient ? *gradient_ : nullptr, &tables, count, factors, words,
                               nullptr);
        return {values_of(is_8bit ? m_codes.tensor() : m_.tensor(), m_scale.tensor(), true),
                values_of(is_8bit ? v_codes.tensor() : v_.tensor(), v_scale.tensor(), false),
                has_master ? Master{weight_.tensor(), remainder_.tensor()}.values()
                           : weight_.tensor().to(at::kFloat)};
      });
      adamw_update_compact(master, m, v, has_gradient ? gradient : at::Tensor(), step, noise);
      const Tensors expected = {values_of(m.values, m.scale, true), values_of(v.values, v.scale, false),
                                master.values().to(at::kFloat)};
      for (size_t i = 0; i < 3; ++i) {
        const at::Tensor is_other = (got[i] - expected[i]).abs() > expected[i].abs() * 1e-5 + 1e-8;
        EXPECT_LE(is_other.sum().item<int64_t>(), std::max<int64_t>(1, count / 200)) << i;
        EXPECT_TRUE(at::allclose(got[i], expected[i], 0.05, 1e-2 * expected[i].abs().max().item<double>()))
            << i;
      }
    }
  }
}

}  // namespace
}  // namespace caldera
