#include "model/ops/few_rows_avx2.h"

#ifdef __x86_64__
#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "base/simd_level.h"

namespace caldera::avx2 {
namespace {

constexpr int64_t kLine = 64;  // bytes

CALDERA_AVX2_INLINE __m256i load(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }

// How numbers of each type are multiplied: a line of the weight in kParts vectors, products added to lanes,
// which hold the sums of kMost inputs. With so many rows of the weight as kOutputs one of x keeps the
// processor busy: an addition in float32 waits for the one before it.
struct Floats {
  using Number = float;
  using Weight = float;
  using Vector = __m256;
  static constexpr int kParts = 2, kOutputs = 8;
  static constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  CALDERA_AVX2_INLINE static __m256 of_row(const float* x, int part) { return _mm256_loadu_ps(x + 8 * part); }
  CALDERA_AVX2_INLINE static __m256 of_weight(const float* w, int part) { return of_row(w, part); }
  CALDERA_AVX2_INLINE static void add(__m256 x, __m256 w, __m256& sums) {
    sums = _mm256_fmadd_ps(x, w, sums);
  }
};

// bfloat16's even and odd numbers are widened where they are.
struct Halves {
  using Number = c10::BFloat16;
  using Weight = c10::BFloat16;
  using Vector = __m256;
  static constexpr int kParts = 4, kOutputs = 8;
  static constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  CALDERA_AVX2_INLINE static __m256 of_row(const c10::BFloat16* x, int part) {
    const __m256i pairs = load(x + part / 2 * 16), upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    return _mm256_castsi256_ps(part % 2 == 0 ? _mm256_slli_epi32(pairs, 16) : _mm256_and_si256(pairs, upper));
  }
  CALDERA_AVX2_INLINE static __m256 of_weight(const c10::BFloat16* w, int part) { return of_row(w, part); }
  CALDERA_AVX2_INLINE static void add(__m256 x, __m256 w, __m256& sums) {
    sums = _mm256_fmadd_ps(x, w, sums);
  }
};

// Bytes are widened to 16 bits, and neighbours' products added at once: 2 * 127 * 32767 at the most, of which
// a lane holds 256.
struct Bytes {
  using Number = int16_t;
  using Weight = int8_t;
  using Vector = __m256i;
  static constexpr int kParts = 4, kOutputs = 4;
  static constexpr int64_t kMost = 256 * 16;
  CALDERA_AVX2_INLINE static __m256i of_row(const int16_t* x, int part) { return load(x + 16 * part); }
  CALDERA_AVX2_INLINE static __m256i of_weight(const int8_t* w, int part) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * part)));
  }
  CALDERA_AVX2_INLINE static void add(__m256i x, __m256i w, __m256i& sums) {
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(x, w));
    __asm__("" : "+x"(sums));  // added in this order: in the compiler's own there are too few registers
  }
};

// totals[i] += the lanes of sums[i], of four.
CALDERA_AVX2_INLINE void add_lanes(const __m256* sums, double* totals) {
  const __m256 fours = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
  const __m128 all = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
  _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), _mm256_cvtps_pd(all)));
}
CALDERA_AVX2_INLINE __m256d added_halves(__m256i v) {
  return _mm256_add_pd(_mm256_cvtepi32_pd(_mm256_castsi256_si128(v)),
                       _mm256_cvtepi32_pd(_mm256_extracti128_si256(v, 1)));
}
CALDERA_AVX2_INLINE void add_lanes(const __m256i* sums, double* totals) {
  const __m256d first = _mm256_hadd_pd(added_halves(sums[0]), added_halves(sums[1])),
                second = _mm256_hadd_pd(added_halves(sums[2]), added_halves(sums[3]));
  const __m256d all =
      _mm256_add_pd(_mm256_permute2f128_pd(first, second, 0x20), _mm256_permute2f128_pd(first, second, 0x31));
  _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), all));
}

// f(0) ... f(kCount - 1), of constants: sums in an array are kept in registers where all places in it are
// known.
template <int kCount, class Function>
CALDERA_AVX2_INLINE void each(Function f) {
  [&]<int... i>(std::integer_sequence<int, i...>) CALDERA_AVX2_ALWAYS {
    (f(std::integral_constant<int, i>()), ...);
  }
  (std::make_integer_sequence<int, kCount>());
}

// sums [kRows, kOutputs] += a line of kRows rows, `stride` apart, times one of kOutputs weights.
template <class Type, int kRows, int kOutputs>
CALDERA_AVX2_INLINE void add_line(const typename Type::Number* x, int64_t stride,
                                  const typename Type::Weight* const* w, int64_t i,
                                  typename Type::Vector* sums) {
  each<Type::kParts>([&](auto part) CALDERA_AVX2_ALWAYS {
    typename Type::Vector rows[kRows];
    each<kRows>([&](auto r) CALDERA_AVX2_ALWAYS { rows[r] = Type::of_row(x + r * stride + i, part); });
    each<kOutputs>([&](auto o) CALDERA_AVX2_ALWAYS {
      const typename Type::Vector weight = Type::of_weight(w[o] + i, part);
      each<kRows>([&](auto r) CALDERA_AVX2_ALWAYS { Type::add(rows[r], weight, sums[r * kOutputs + o]); });
    });
  });
}

// kRows rows of x times `count` of the weight's, kOutputs at a time. Where fewer are left the last one stands
// in for those missing.
template <class Type, int kRows, int kOutputs>
CALDERA_AVX2_INLINE void some_rows(const typename Type::Number* x, const typename Type::Weight* weight,
                                   float* sums, int64_t num_inputs, int64_t num_outputs, int64_t begin,
                                   int64_t count) {
  constexpr int64_t kWidth = kLine / sizeof(typename Type::Weight);
  constexpr int kSums = kRows * kOutputs;
  for (int64_t o = 0; o < count; o += kOutputs) {
    const typename Type::Weight* w[kOutputs];
    for (int64_t j = 0; j < kOutputs; ++j) w[j] = weight + (begin + std::min(o + j, count - 1)) * num_inputs;
    double totals[kSums] = {};
    for (int64_t first = 0; first < num_inputs;) {
      const int64_t last = num_inputs - first > Type::kMost ? first + Type::kMost : num_inputs;
      const int64_t whole = last - (last - first) % kWidth;
      typename Type::Vector lanes[kSums] = {};
      for (int64_t i = first; i < whole; i += kWidth) {
        // The same line of the next eight outputs: while sums are added up, memory goes on.
        for (int64_t j = 0; j < kOutputs; ++j) __builtin_prefetch(w[j] + 8 * num_inputs + i);
        add_line<Type, kRows, kOutputs>(x, num_inputs, w, i, lanes);
      }
      if (whole < last) {  // filled up with zeros
        typename Type::Number rest_of_x[kRows * kWidth] = {};
        typename Type::Weight rest_of_weight[kOutputs * kWidth] = {};
        const typename Type::Weight* rest[kOutputs];
        for (int64_t r = 0; r < kRows; ++r)
          std::copy_n(x + r * num_inputs + whole, last - whole, rest_of_x + r * kWidth);
        for (int64_t j = 0; j < kOutputs; ++j) {
          rest[j] = rest_of_weight + j * kWidth;
          std::copy_n(w[j] + whole, last - whole, rest_of_weight + j * kWidth);
        }
        add_line<Type, kRows, kOutputs>(rest_of_x, kWidth, rest, 0, lanes);
      }
      each<kSums / 4>([&](auto i) CALDERA_AVX2_ALWAYS { add_lanes(lanes + 4 * i, totals + 4 * i); });
      first = last;
    }
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t j = 0; j < std::min<int64_t>(kOutputs, count - o); ++j)
        sums[r * num_outputs + begin + o + j] = static_cast<float>(totals[r * kOutputs + j]);
    }
  }
}

// Eight outputs at a time: rows beyond the first ones find their weights in the nearest cache. A sum is added
// up in the same order whichever rows and outputs share its loads.
template <class Type>
CALDERA_AVX2_INLINE void all_rows(const typename Type::Number* x, const typename Type::Weight* weight,
                                  float* sums, int64_t num_rows, int64_t num_inputs, int64_t num_outputs,
                                  int64_t begin, int64_t end) {
  for (int64_t o = begin; o < end; o += 8) {
    const int64_t count = std::min<int64_t>(8, end - o);
    int64_t r = 0;
    const auto at = [&] { return x + r * num_inputs; };
    const auto into = [&] { return sums + r * num_outputs; };
    for (; r + 4 <= num_rows; r += 4)
      some_rows<Type, 4, 2>(at(), weight, into(), num_inputs, num_outputs, o, count);
    for (; r + 2 <= num_rows; r += 2)
      some_rows<Type, 2, 4>(at(), weight, into(), num_inputs, num_outputs, o, count);
    if (r < num_rows)
      some_rows<Type, 1, Type::kOutputs>(at(), weight, into(), num_inputs, num_outputs, o, count);
  }
}

}  // namespace

CALDERA_AVX2 void float_sums(const float* x, const float* weight, float* sums, int64_t num_rows,
                             int64_t num_inputs, int64_t num_outputs, int64_t begin, int64_t end) {
  all_rows<Floats>(x, weight, sums, num_rows, num_inputs, num_outputs, begin, end);
}
CALDERA_AVX2 void bf16_sums(const c10::BFloat16* x, const c10::BFloat16* weight, float* sums,
                            int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t begin,
                            int64_t end) {
  all_rows<Halves>(x, weight, sums, num_rows, num_inputs, num_outputs, begin, end);
}
CALDERA_AVX2 void int8_sums(const ShortRows& x, const int8_t* weight, float* sums, int64_t num_rows,
                            int64_t num_inputs, int64_t num_outputs, int64_t begin, int64_t end) {
  all_rows<Bytes>(x.values.data(), weight, sums, num_rows, num_inputs, num_outputs, begin, end);
}

}  // namespace caldera::avx2
#endif
