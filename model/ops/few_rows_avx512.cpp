#include "model/ops/few_rows_avx512.h"

#ifdef CALDERA_NARROW_PRODUCTS
#include <immintrin.h>

#include <algorithm>
#include <cmath>

namespace caldera {
namespace {

// Four outputs share the loads of x. Where fewer are left the last one stands in for those missing.
constexpr int64_t kShared = 4;

template <class W>
void weight_rows(const W* weight, int64_t num_inputs, int64_t output, int64_t count, const W** rows) {
  for (int64_t j = 0; j < kShared; ++j) rows[j] = weight + (output + std::min(j, count - 1)) * num_inputs;
}

}  // namespace

bool has_bf16_products() {
  static const bool has = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
  return has;
}

bool has_int8_products() {
  static const bool has = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
  return has;
}

__attribute__((target("avx512f,avx512bw,avx512bf16"))) void bf16_outputs(
    const c10::BFloat16* x, const c10::BFloat16* weight, const c10::BFloat16* bias, c10::BFloat16* y,
    int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = 32;
  const int64_t whole = num_inputs / kWidth * kWidth;
  const __mmask32 rest = (1u << (num_inputs - whole)) - 1;
  const c10::BFloat16* w[kShared];
  for (int64_t o = begin; o < end; o += kShared) {
    const int64_t count = std::min(kShared, end - o);
    weight_rows(weight, num_inputs, o, count, w);
    for (int64_t r = 0; r < num_rows; ++r) {
      const c10::BFloat16* row = x + r * num_inputs;
      __m512 sums[kShared] = {};
      for (int64_t i = 0; i < whole; i += kWidth) {
        const auto v = reinterpret_cast<__m512bh>(_mm512_loadu_si512(row + i));
        for (int64_t j = 0; j < kShared; ++j)
          sums[j] = _mm512_dpbf16_ps(sums[j], v, reinterpret_cast<__m512bh>(_mm512_loadu_si512(w[j] + i)));
      }
      if (rest != 0) {
        const auto v = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(rest, row + whole));
        for (int64_t j = 0; j < kShared; ++j)
          sums[j] = _mm512_dpbf16_ps(
              sums[j], v, reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(rest, w[j] + whole)));
      }
      for (int64_t j = 0; j < count; ++j)
        y[r * num_outputs + o + j] =
            _mm512_reduce_add_ps(sums[j]) + (bias ? static_cast<float>(bias[o + j]) : 0.0f);
    }
  }
}

SplitRows split_rows(const float* x, int64_t num_rows, int64_t num_inputs) {
  const auto size = static_cast<size_t>(num_rows * num_inputs);
  SplitRows rows{std::vector<uint8_t>(size), std::vector<uint8_t>(size), {}};
  for (int64_t r = 0; r < num_rows; ++r, x += num_inputs) {
    float largest = 0, fault = 0;
    for (int64_t i = 0; i < num_inputs; ++i) {
      largest = std::max(largest, std::abs(x[i]));
      fault += x[i] * 0;  // NaN where a value is not finite
    }
    const float scale = std::max(largest, 1e-30f) / 32767 + fault;
    rows.scale.push_back(scale);
    if (std::isnan(scale)) continue;
    const float inverse = 1 / scale;
    for (int64_t i = 0; i < num_inputs; ++i) {
      const auto value = static_cast<uint32_t>(static_cast<int32_t>(std::nearbyint(x[i] * inverse)) + 32768);
      const auto at = static_cast<size_t>(r * num_inputs + i);
      rows.high[at] = static_cast<uint8_t>(value >> 8);
      rows.low[at] = static_cast<uint8_t>(value & 0xFF);
    }
  }
  return rows;
}

// The instruction multiplies unsigned bytes by signed ones: hence x + 32768, of which 32768 times the sum of
// the weights is too much.
__attribute__((target("avx512f,avx512bw,avx512vnni"))) void int8_sums(
    const SplitRows& x, const int8_t* weight, const int32_t* weight_sums, int64_t* sums, int64_t num_rows,
    int64_t num_inputs, int64_t num_outputs, int64_t begin, int64_t end) {
  constexpr int64_t kWidth = 64;
  const int64_t whole = num_inputs / kWidth * kWidth;
  const __mmask64 rest = (uint64_t{1} << (num_inputs - whole)) - 1;
  const int8_t* w[kShared];
  for (int64_t o = begin; o < end; o += kShared) {
    const int64_t count = std::min(kShared, end - o);
    weight_rows(weight, num_inputs, o, count, w);
    for (int64_t r = 0; r < num_rows; ++r) {
      const uint8_t *high_row = x.high.data() + r * num_inputs, *low_row = x.low.data() + r * num_inputs;
      __m512i high[kShared] = {}, low[kShared] = {};
      for (int64_t i = 0; i < num_inputs; i += kWidth) {
        const __mmask64 mask = i < whole ? ~__mmask64{0} : rest;
        const __m512i h = _mm512_maskz_loadu_epi8(mask, high_row + i);
        const __m512i l = _mm512_maskz_loadu_epi8(mask, low_row + i);
        for (int64_t j = 0; j < kShared; ++j) {
          const __m512i v = _mm512_maskz_loadu_epi8(mask, w[j] + i);
          high[j] = _mm512_dpbusd_epi32(high[j], h, v);
          low[j] = _mm512_dpbusd_epi32(low[j], l, v);
        }
      }
      for (int64_t j = 0; j < count; ++j)
        sums[r * num_outputs + o + j] = int64_t{256} * _mm512_reduce_add_epi32(high[j]) +
                                        _mm512_reduce_add_epi32(low[j]) - int64_t{32768} * weight_sums[o + j];
    }
  }
}

}  // namespace caldera
#endif
