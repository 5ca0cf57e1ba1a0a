#include "model/ops/few_rows_avx512.h"

#ifdef __x86_64__
#include <immintrin.h>

#include <algorithm>
#include <utility>

#include "base/cpu.h"
#include "model/ops/short_rows.h"

#define CALDERA_BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512bf16")))
#define CALDERA_INT8_TARGET __attribute__((target("avx512f,avx512bw,avx512vnni")))

namespace caldera {
namespace {

// Four outputs share the loads of x, each with a sum of its own: named one by one, for the compiler keeps no
// array of them in registers. Where fewer outputs are left the last one stands in for those missing.
constexpr int64_t kShared = 4;

template <class W>
void weight_rows(const W* weight, int64_t num_inputs, int64_t output, int64_t count, const W** rows) {
  for (int64_t j = 0; j < kShared; ++j) rows[j] = weight + (output + std::min(j, count - 1)) * num_inputs;
}

// The same place of the next four rows: while sums are added up, memory goes on.
template <class W>
inline void prefetch_next(const W* const* rows, int64_t num_inputs, int64_t input) {
  for (int64_t j = 0; j < kShared; ++j) __builtin_prefetch(rows[j] + kShared * num_inputs + input);
}

// The first `count` values, then zeros. (A masked load of all of them takes three times as long as a plain
// one.)
CALDERA_BF16_TARGET inline __m512bh load_bf16(const c10::BFloat16* x, int64_t count) {
  return reinterpret_cast<__m512bh>(count >= 32 ? _mm512_loadu_si512(x)
                                                : _mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, x));
}
CALDERA_INT8_TARGET inline __m512i load_bytes(const void* x, int64_t count) {
  return count >= 64 ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi8((__mmask64{1} << count) - 1, x);
}

}  // namespace

bool has_bf16_products() { return cpu().avx512_bf16; }
bool has_int8_products() { return cpu().avx512_vnni; }

CALDERA_BF16_TARGET void bf16_sums(const c10::BFloat16* x, const c10::BFloat16* weight, float* sums,
                                   int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t begin,
                                   int64_t end) {
  constexpr int64_t kWidth = 32;
  const c10::BFloat16* w[kShared];
  for (int64_t o = begin; o < end; o += kShared) {
    const int64_t count = std::min(kShared, end - o);
    weight_rows(weight, num_inputs, o, count, w);
    for (int64_t r = 0; r < num_rows; ++r) {
      const c10::BFloat16* row = x + r * num_inputs;
      __m512 s0 = {}, s1 = {}, s2 = {}, s3 = {};
      for (int64_t i = 0; i < num_inputs; i += kWidth) {
        const int64_t left = num_inputs - i;
        prefetch_next(w, num_inputs, i);
        const __m512bh v = load_bf16(row + i, left);
        s0 = _mm512_dpbf16_ps(s0, v, load_bf16(w[0] + i, left));
        s1 = _mm512_dpbf16_ps(s1, v, load_bf16(w[1] + i, left));
        s2 = _mm512_dpbf16_ps(s2, v, load_bf16(w[2] + i, left));
        s3 = _mm512_dpbf16_ps(s3, v, load_bf16(w[3] + i, left));
      }
      const float all[kShared] = {_mm512_reduce_add_ps(s0), _mm512_reduce_add_ps(s1),
                                  _mm512_reduce_add_ps(s2), _mm512_reduce_add_ps(s3)};
      std::copy_n(all, count, sums + r * num_outputs + o);
    }
  }
}

SplitRows split_rows(const float* x, int64_t num_rows, int64_t num_inputs) {
  ShortRows rows = short_rows(x, num_rows, num_inputs);
  SplitRows split{std::vector<uint8_t>(rows.values.size()), std::vector<uint8_t>(rows.values.size()),
                  std::move(rows.scale)};
  for (size_t i = 0; i < rows.values.size(); ++i) {
    const auto value = static_cast<uint16_t>(rows.values[i] + 32768);
    split.high[i] = static_cast<uint8_t>(value >> 8);
    split.low[i] = static_cast<uint8_t>(value & 0xFF);
  }
  return split;
}

// The instruction multiplies unsigned bytes by signed ones: hence x + 32768, of which 32768 times the sum of
// the weights is too much.
CALDERA_INT8_TARGET void int8_sums(const SplitRows& x, const int8_t* weight, const int32_t* weight_sums,
                                   float* sums, int64_t num_rows, int64_t num_inputs, int64_t num_outputs,
                                   int64_t begin, int64_t end) {
  constexpr int64_t kWidth = 64;
  const int8_t* w[kShared];
  for (int64_t o = begin; o < end; o += kShared) {
    const int64_t count = std::min(kShared, end - o);
    weight_rows(weight, num_inputs, o, count, w);
    for (int64_t r = 0; r < num_rows; ++r) {
      const uint8_t *high_row = x.high.data() + r * num_inputs, *low_row = x.low.data() + r * num_inputs;
      __m512i h0 = {}, h1 = {}, h2 = {}, h3 = {}, l0 = {}, l1 = {}, l2 = {}, l3 = {};
      for (int64_t i = 0; i < num_inputs; i += kWidth) {
        const int64_t left = num_inputs - i;
        prefetch_next(w, num_inputs, i);
        const __m512i high = load_bytes(high_row + i, left);
        const __m512i low = load_bytes(low_row + i, left);
        const __m512i w0 = load_bytes(w[0] + i, left), w1 = load_bytes(w[1] + i, left);
        const __m512i w2 = load_bytes(w[2] + i, left), w3 = load_bytes(w[3] + i, left);
        h0 = _mm512_dpbusd_epi32(h0, high, w0);
        l0 = _mm512_dpbusd_epi32(l0, low, w0);
        h1 = _mm512_dpbusd_epi32(h1, high, w1);
        l1 = _mm512_dpbusd_epi32(l1, low, w1);
        h2 = _mm512_dpbusd_epi32(h2, high, w2);
        l2 = _mm512_dpbusd_epi32(l2, low, w2);
        h3 = _mm512_dpbusd_epi32(h3, high, w3);
        l3 = _mm512_dpbusd_epi32(l3, low, w3);
      }
      const int64_t highs[kShared] = {_mm512_reduce_add_epi32(h0), _mm512_reduce_add_epi32(h1),
                                      _mm512_reduce_add_epi32(h2), _mm512_reduce_add_epi32(h3)};
      const int64_t lows[kShared] = {_mm512_reduce_add_epi32(l0), _mm512_reduce_add_epi32(l1),
                                     _mm512_reduce_add_epi32(l2), _mm512_reduce_add_epi32(l3)};
      for (int64_t j = 0; j < count; ++j)
        sums[r * num_outputs + o + j] =
            static_cast<float>(256 * highs[j] + lows[j] - int64_t{32768} * weight_sums[o + j]);
    }
  }
}

}  // namespace caldera
#endif
