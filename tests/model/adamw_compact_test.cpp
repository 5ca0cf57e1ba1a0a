// AdamW in less memory: 8-bit moments against bitsandbytes' numbers (tests/golden/adamw_8bit.safetensors,
// made by scripts/make_goldens_optimizer.py) and weights without masters, whose rounding must be fair.
#include "model/ops/adamw_compact.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "model/ops/dynamic_map.h"
#include "model/weights/safetensors.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

constexpr AdamWStep kCompactStep = {.learning_rate = 1e-2,
                             .beta1 = 0.9,
                             .beta2 = 0.98,
                             .epsilon = 1e-8,
                             .weight_decay = 0.1,
                             .grad_scale = 0.7};

class AdamW8bit : public testing::Test {
 protected:
  at::Tensor golden(const std::string& name) const { return file_->read(name); }
  std::unique_ptr<TensorSource> file_ =
      open_safetensors(CALDERA_SOURCE_DIR "/tests/golden/adamw_8bit.safetensors");
};

at::Tensor map_tensor(bool is_signed) {
  const std::array<float, 256>& map = dynamic_map(is_signed);
  return at::tensor(at::ArrayRef<float>(map.data(), map.size()));
}

TEST_F(AdamW8bit, TheMapsAreBitsandbytes) {
  EXPECT_TRUE(at::allclose(map_tensor(true), golden("map.signed"), 1e-6, 0));
  EXPECT_TRUE(at::allclose(map_tensor(false), golden("map.unsigned"), 1e-6, 0));
}

TEST_F(AdamW8bit, UpdatesAreBitsandbytes) {
  const at::Tensor weight = golden("weight").clone(), gradients = golden("gradients");
  const Moment m = zero_moment(weight, true), v = zero_moment(weight, true);
  for (int64_t step = 0; step < gradients.size(0); ++step) {
    AdamWStep now = kCompactStep;
    now.count = step + 1;
    adamw_update_compact({weight, {}}, m, v, gradients[step].contiguous(), now, {});
    const std::string at = "." + std::to_string(step);
    EXPECT_TRUE(at::allclose(weight, golden("weight" + at), 1e-5, 1e-6)) << step;
    EXPECT_TRUE(at::allclose(m.scale, golden("exp_avg.scale" + at), 1e-5, 0)) << step;
    EXPECT_TRUE(at::allclose(v.scale, golden("exp_avg_sq.scale" + at), 1e-5, 0)) << step;
    // A value half way between two codes may fall to either by its last bit; then no further than one code.
    for (const auto& [codes, name] : {std::pair{m.values, "exp_avg"}, {v.values, "exp_avg_sq"}}) {
      const at::Tensor apart = (codes.to(at::kInt) - golden(name + (".codes" + at)).to(at::kInt)).abs();
      EXPECT_LE(apart.max().item<int>(), 1) << name << step;
      EXPECT_LE(apart.sum().item<int64_t>(), 3) << name << step;
    }
  }
}

TEST(DynamicMap, TheKernelsSearchFindsTheNearestCode) {
  for (const bool is_signed : {true, false}) {
    // All magnitudes, borders between codes and their neighbours among them.
    at::Tensor values = at::cat({at::logspace(-9, 0, 20001, 10.0, at::kFloat), at::tensor({0.0f, 1e-30f})});
    const at::Tensor map = map_tensor(is_signed);
    const at::Tensor borders = (map.slice(0, 1) + map.slice(0, 0, 255)) / 2;
    values = at::cat({values, borders, borders * 1.000001, borders * 0.999999, map});
    if (is_signed) values = at::cat({values, -values});
    const Quantized expected = quantize_dynamic(at::cat({at::ones({1}), values}), is_signed);
    const CodeSearch& search = CodeSearch::of(is_signed);
    for (int64_t i = 0; i < values.numel(); ++i) {
      const float value = values[i].item<float>();
      const at::Tensor distance = (map - value).abs();
      // Half way between two codes either may seem the nearer one, by the last bit of the value.
      ASSERT_NEAR(distance[search(value)].item<float>(), distance.min().item<float>(), 2e-7 * std::abs(value))
          << value;
    }
    EXPECT_EQ(expected.codes[0].item<int>(), 255);
  }
}

TEST(DynamicMap, RoundTripsWithinTheMapsSteps) {
  at::manual_seed(1);
  const at::Tensor values = at::randn({7, 100});
  for (const bool is_signed : {true, false}) {
    const at::Tensor x = is_signed ? values : values.abs();
    const Quantized quantized = quantize_dynamic(x, is_signed);
    EXPECT_EQ(quantized.scale.numel(), 3);
    const at::Tensor error = (dequantize_dynamic(quantized, is_signed) - x).abs();
    EXPECT_LT(error.max().item<float>(), x.abs().max().item<float>() * (is_signed ? 0.0071 : 0.0036));
  }
  EXPECT_TRUE(
      at::equal(dequantize_dynamic(quantize_dynamic(at::zeros({300}), true), true), at::zeros({300})));
}

// The kernel against the formula in ATen, for every form of state and weight.
TEST(AdamWCompact, IsThePlainFormula) {
  at::manual_seed(2);
  for (const bool is_8bit : {false, true}) {
    for (const bool has_master : {true, false}) {
      for (const int64_t count : {1, 255, 700}) {
        const at::Tensor start = at::randn({count}), gradient = at::randn({count}).to(at::kBFloat16);
        const at::Tensor weight = start.to(at::kBFloat16);
        const Master master = has_master ? Master::of(weight) : Master{weight, {}};
        if (has_master) master.assign(start);
        const Moment m = zero_moment(start, is_8bit), v = zero_moment(start, is_8bit);
        const RoundingNoise noise{.key = 5, .first = 1000};
        adamw_update_compact(master, m, v, gradient, kCompactStep, noise);

        const at::Tensor value = has_master ? start.clone() : start.to(at::kBFloat16).to(at::kFloat);
        const at::Tensor m_plain = at::zeros({count}), v_plain = at::zeros({count});
        adamw_update(Master::of(value), m_plain, v_plain, gradient, kCompactStep);
        if (has_master) {
          EXPECT_TRUE(at::equal(master.values(), value));
          EXPECT_TRUE(is_nearest(weight, value));
        } else {
          EXPECT_TRUE(at::equal(weight, round_stochastically(value, noise)));
        }
        if (!is_8bit) {
          EXPECT_TRUE(at::equal(m.values, m_plain) && at::equal(v.values, v_plain));
          continue;
        }
        const Quantized m_codes = quantize_dynamic(m_plain, true), v_codes = quantize_dynamic(v_plain, false);
        EXPECT_TRUE(at::equal(m.values, m_codes.codes) && at::equal(m.scale, m_codes.scale)) << count;
        EXPECT_TRUE(at::equal(v.values, v_codes.codes) && at::equal(v.scale, v_codes.scale)) << count;
      }
    }
  }
}

TEST(AdamWCompact, TheNumberOfThreadsChangesNoBit) {
  const int threads = at::get_num_threads();
  at::manual_seed(3);
  const at::Tensor start = at::randn({100000}).to(at::kBFloat16), gradient = at::randn({100000});
  std::vector<at::Tensor> weights, codes;
  for (const int number : {1, 2}) {
    at::set_num_threads(number);
    weights.push_back(start.clone());
    const Moment m = zero_moment(start, true), v = zero_moment(start, true);
    adamw_update_compact({weights.back(), {}}, m, v, gradient, kCompactStep, {.key = 1});
    codes.push_back(m.values);
  }
  at::set_num_threads(threads);
  EXPECT_TRUE(at::equal(weights[0], weights[1]) && at::equal(codes[0], codes[1]));
}

TEST(StochasticRounding, IsFairAndAFunctionOfKeyAndElement) {
  // A fifth of the way from 1 to the next bfloat16, 1 + 2^-7.
  const int64_t count = 100000;
  const double share = 0.2;
  const at::Tensor values = at::full({count}, 1 + share / 128);
  const at::Tensor up = round_stochastically(values, {.key = 1}) > 1.001;
  // Three standard deviations of a binomial.
  EXPECT_NEAR(up.to(at::kFloat).mean().item<double>(), share, 3 * std::sqrt(share * (1 - share) / count));
  EXPECT_TRUE(at::equal(up, round_stochastically(values, {.key = 1}) > 1.001));
  const at::Tensor other = round_stochastically(values, {.key = 2}) > 1.001;
  // Keys and neighbours are independent: both go up as often as chance has it.
  EXPECT_NEAR((up & other).to(at::kFloat).mean().item<double>(), share * share, 0.004);
  EXPECT_NEAR((up.slice(0, 1) & up.slice(0, 0, count - 1)).to(at::kFloat).mean().item<double>(),
              share * share, 0.004);
  // A part of a tensor draws what the whole draws there.
  EXPECT_TRUE(at::equal(up.slice(0, 300, 400),
                        round_stochastically(values.slice(0, 300, 400), {.key = 1, .first = 300}) > 1.001));
}

TEST(StochasticRounding, KeepsWhatNeedsNoRounding) {
  const float infinity = std::numeric_limits<float>::infinity();
  const at::Tensor exact = at::tensor({0.0f, -1.5f, 3e38f, infinity, -infinity}).to(at::kBFloat16);
  EXPECT_TRUE(at::equal(round_stochastically(exact.to(at::kFloat), {.key = 9}), exact));
  EXPECT_TRUE(round_stochastically(at::tensor({std::nanf("")}), {.key = 9}).isnan().all().item<bool>());
}

}  // namespace
}  // namespace caldera
