#include "model/ops/adamw_compact.h"

#include <algorithm>
#include <array>
#include <limits>

#include "base/error.h"
#include "base/rng.h"
#include "model/ops/adamw_math.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/dynamic_map.h"
#include "model/ops/noise.h"

namespace caldera {
namespace {

using namespace simd;

constexpr int64_t kBlock = kQuantizedBlock;
constexpr int64_t kGrainBlocks = 64;  // blocks below which a second thread is not worth it

template <Vector V>
CALDERA_INLINE void store_stochastic(c10::BFloat16* x, const V& value, int64_t n, uint32_t index,
                                     const NoiseWords& words) {
  using Bits = BitsOf<V>;
  const Bits hash = noise_lanes<V>(index, words);
  const Bits bits = reinterpret_cast<Bits>(value);
  // Infinities and NaN stay what they are.
  const Bits is_finite = reinterpret_cast<Bits>((bits & 0x7F800000u) != 0x7F800000u);
  const Bits rounded = (bits + ((hash >> 16) & is_finite)) & 0xFFFF0000u;
  store(x, reinterpret_cast<V>(rounded), n);  // exact: nothing is left to round
}

// The whole tensors; what is null is not there.
struct CompactArrays {
  float* whole_weight = nullptr;
  c10::BFloat16* weight = nullptr;
  int16_t* remainder = nullptr;
  const float* gradient = nullptr;
  const c10::BFloat16* gradient_bf16 = nullptr;
  float *m = nullptr, *v = nullptr;
  uint8_t *m_codes = nullptr, *v_codes = nullptr;
  float *m_scale = nullptr, *v_scale = nullptr;
};

CALDERA_INLINE void decode(const uint8_t* codes, float scale, const std::array<float, 256>& map,
                           float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = map[codes[i]] * scale;
}
// `values` are brought to [-1, 1] in place; returns by what they were divided.
template <class V>
CALDERA_INLINE float encode(float* values, const CodeSearch& search, uint8_t* codes, int64_t n) {
  V most = {};
  for (int64_t i = 0; i < n; i += kLanesOf<V>) {
    const V x = load<V>(values + i, std::min(kLanesOf<V>, n - i));
    most = simd::max(most, simd::max(x, V(-x)));
  }
  const float scale = maximum(most), factor = 1.0f / std::max(scale, std::numeric_limits<float>::min());
  for (int64_t i = 0; i < n; i += kLanesOf<V>) {
    const int64_t lanes = std::min(kLanesOf<V>, n - i);
    store(values + i, V(load<V>(values + i, lanes) * factor), lanes);
  }
  for (int64_t i = 0; i < n; ++i) codes[i] = search(values[i]);
  return scale;
}

template <class V>
CALDERA_INLINE void update_blocks(const CompactArrays& a, int64_t first_block, int64_t last_block, int64_t count,
                                  const AdamWFactors& f, uint32_t first_index, const NoiseWords& words) {
  const std::array<float, 256>&m_map = dynamic_map(true), &v_map = dynamic_map(false);
  const CodeSearch &m_search = CodeSearch::of(true), &v_search = CodeSearch::of(false);
  float m_buffer[kBlock], v_buffer[kBlock];
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kBlock, size = std::min(kBlock, count - begin);
    float *m = a.m ? a.m + begin : m_buffer, *v = a.v ? a.v + begin : v_buffer;
    if (a.m_codes) decode(a.m_codes + begin, a.m_scale[block], m_map, m, size);
    if (a.v_codes) decode(a.v_codes + begin, a.v_scale[block], v_map, v, size);
    for (int64_t i = 0; i < size; i += kLanesOf<V>) {
      const int64_t n = std::min(kLanesOf<V>, size - i), at = begin + i;
      const V g = a.gradient        ? load<V>(a.gradient + at, n) * f.grad_scale
                  : a.gradient_bf16 ? load<V>(a.gradient_bf16 + at, n) * f.grad_scale
                                    : V{};
      V m_lanes = load<V>(m + i, n), v_lanes = load<V>(v + i, n);
      const WholeWeights whole{a.whole_weight};
      const SplitWeights split{a.weight, a.remainder};
      const V before = a.whole_weight ? load<V>(whole, at, n)
                       : a.remainder  ? load<V>(split, at, n)
                                      : load<V>(a.weight + at, n);
      const V w = adamw_lanes(before, m_lanes, v_lanes, g, f);
      store(m + i, m_lanes, n);
      store(v + i, v_lanes, n);
      if (a.whole_weight)
        store(whole, at, w, n);
      else if (a.remainder)
        store(split, at, w, n);
      else
        store_stochastic(a.weight + at, w, n, first_index + static_cast<uint32_t>(at), words);
    }
    if (a.m_codes) a.m_scale[block] = encode<V>(m, m_search, a.m_codes + begin, size);
    if (a.v_codes) a.v_scale[block] = encode<V>(v, v_search, a.v_codes + begin, size);
  }
}

// Of a moment's three, those of the form that it has.
void set_pointers(const Moment& moment, float*& values, uint8_t*& codes, float*& scale) {
  if (moment.scale.defined()) {
    codes = moment.values.mutable_data_ptr<uint8_t>();
    scale = moment.scale.mutable_data_ptr<float>();
  } else {
    values = moment.values.mutable_data_ptr<float>();
  }
}

void update_on_cuda(const Master& master, const Moment& exp_avg, const Moment& exp_avg_sq,
                    const at::Tensor& gradient, const AdamWFactors& f, const RoundingNoise& noise) {
  cuda::CompactState state;
  set_pointers(exp_avg, state.exp_avg, state.exp_avg_codes, state.exp_avg_scale);
  set_pointers(exp_avg_sq, state.exp_avg_sq, state.exp_avg_sq_codes, state.exp_avg_sq_scale);
  state.weights = cuda::weights_of(master);
  const at::Tensor& weight = master.weight;
  const NoiseWords words = noise_words(noise.key);
  cuda::with_type(gradient.defined() ? gradient : weight, [&]<class T>(T*, cuda::Stream stream) {
    cuda::adamw_compact(state, cuda::in<T>(gradient), code_tables_on(weight.device()),
                        weight.numel(),
                        {f.decay, f.one_minus_beta1, f.beta2, f.one_minus_beta2, f.step_size,
                         f.inverse_correction2, f.epsilon, f.grad_scale},
                        {words, static_cast<uint32_t>(noise.first)}, stream);
  });
}

}  // namespace

Moment zero_moment(const at::Tensor& like, bool is_8bit) {
  const auto options = like.options().requires_grad(false);
  if (!is_8bit) return {at::zeros(like.sizes(), options.dtype(at::kFloat)), {}};
  const at::Tensor scale = at::zeros({(like.numel() + kBlock - 1) / kBlock}, options.dtype(at::kFloat));
  // Codes whose scale is zero count as zeros, whatever they are.
  return {at::zeros(like.sizes(), options.dtype(at::kByte)), scale};
}

at::Tensor round_stochastically(const at::Tensor& values, const RoundingNoise& noise) {
  const at::NoGradGuard no_grad;
  const NoiseWords words = noise_words(noise.key);
  constexpr int64_t kWord = 0xFFFFFFFF;
  const auto shift = [](const at::Tensor& x, int64_t bits) { return x.bitwise_right_shift(bits); };
  const auto multiply = [](const at::Tensor& x, uint32_t by) {
    // Halves apart, so that nothing overflows 64 bits.
    const int64_t factor = by;
    return ((x.bitwise_and(0xFFFF) * factor) +
            ((x.bitwise_right_shift(16) * factor).bitwise_and(0xFFFF) * 65536))
        .bitwise_and(kWord);
  };
  at::Tensor hash =
      (at::arange(values.numel(), values.options().dtype(at::kLong)) + noise.first).bitwise_and(kWord);
  hash = hash.bitwise_xor(static_cast<int64_t>(words.first));
  hash = multiply(hash.bitwise_xor(shift(hash, 16)), NoiseWords::kMultiply1);
  hash = (hash.bitwise_xor(shift(hash, 15)) + static_cast<int64_t>(words.second)).bitwise_and(kWord);
  hash = shift(multiply(hash, NoiseWords::kMultiply2), 16).view(values.sizes());
  const at::Tensor bits = values.contiguous().view(at::kInt).to(at::kLong);
  const at::Tensor rounded = (bits + hash).bitwise_and(~int64_t{0xFFFF}).to(at::kInt).view(at::kFloat);
  return at::where(values.isfinite(), rounded, values).to(at::kBFloat16);
}

void adamw_update_compact(const Master& master, const Moment& exp_avg, const Moment& exp_avg_sq,
                          const at::Tensor& gradient_in, const AdamWStep& step, const RoundingNoise& noise) {
  const at::NoGradGuard no_grad;
  CALDERA_PROFILED("adamw_update");
  const at::Tensor& weight = master.weight;
  const int64_t count = weight.numel();
  CALDERA_ASSERT(exp_avg.values.numel() == count && exp_avg_sq.values.numel() == count &&
                 (!master.remainder.defined() || master.remainder.numel() == count));
  const at::Tensor gradient = gradient_in.defined() ? gradient_in.contiguous() : gradient_in;
  CALDERA_ASSERT(!gradient.defined() || gradient.numel() == count);
  const AdamWFactors factors(step);
  if (weight.is_cuda()) return update_on_cuda(master, exp_avg, exp_avg_sq, gradient, factors, noise);
  CompactArrays arrays;
  if (weight.scalar_type() == at::kFloat)
    arrays.whole_weight = weight.mutable_data_ptr<float>();
  else
    arrays.weight = weight.mutable_data_ptr<c10::BFloat16>();
  if (master.remainder.defined()) arrays.remainder = master.remainder.mutable_data_ptr<int16_t>();
  if (gradient.defined() && gradient.scalar_type() == at::kFloat)
    arrays.gradient = gradient.const_data_ptr<float>();
  else if (gradient.defined())
    arrays.gradient_bf16 = gradient.const_data_ptr<c10::BFloat16>();
  set_pointers(exp_avg, arrays.m, arrays.m_codes, arrays.m_scale);
  set_pointers(exp_avg_sq, arrays.v, arrays.v_codes, arrays.v_scale);
  const NoiseWords words = noise_words(noise.key);
  at::parallel_for(0, (count + kBlock - 1) / kBlock, kGrainBlocks, [&](int64_t begin, int64_t end) {
    simd::run<CALDERA_EACH_WIDTH(update_blocks)>(arrays, begin, end, count, factors,
                                                 static_cast<uint32_t>(noise.first), words);
  });
}

}  // namespace caldera
