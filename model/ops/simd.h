// Vector code for the CPU kernels, by the compiler's vector types (base/simd_level.h). Everything computes in
// float32; bfloat16 is converted on loading and storing.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "base/simd_level.h"

namespace caldera::simd {

inline constexpr int64_t kLanes = 16;  // of the widest vectors: what is filled up to so many suits all

template <Vector V>
CALDERA_INLINE V splat(float x) {
  return x - V{};
}
// 0, 1, 2...
template <Vector V>
CALDERA_INLINE BitsOf<V> lane_numbers() {
  BitsOf<V> lanes = {};
  for (int64_t i = 0; i < kLanesOf<V>; ++i) lanes[i] = static_cast<uint32_t>(i);
  return lanes;
}

// n < 2 * kPiece elements, in pieces of powers of two.
template <int64_t kPiece, class T>
CALDERA_INLINE void copy_few(const T* x, int64_t n, T* y) {
  if constexpr (kPiece > 0) {
    const bool has_piece = (n & kPiece) != 0;
    if (has_piece) std::memcpy(y, x, kPiece * sizeof *x);
    copy_few<kPiece / 2>(has_piece ? x + kPiece : x, n, has_piece ? y + kPiece : y);
  }
}
// `n` elements of x, of which `Some` holds as many or more; the others read as zero. (Lane by lane, the
// compiler would keep all of the vector in memory.)
template <class Some, class T>
CALDERA_INLINE Some read_some(const T* x, int64_t n) {
  constexpr int64_t kCount = sizeof(Some) / sizeof(T);
  Some values;
  if (n == kCount) {
    std::memcpy(&values, x, sizeof values);
  } else {
    T few[kCount] = {};
    copy_few<kCount / 2>(x, n, few);
    std::memcpy(&values, few, sizeof values);
  }
  return values;
}
template <class Some, class T>
CALDERA_INLINE void write_some(T* x, const Some& values, int64_t n) {
  constexpr int64_t kCount = sizeof(Some) / sizeof(T);
  if (n == kCount) {
    std::memcpy(x, &values, sizeof values);
  } else {
    T few[kCount];
    std::memcpy(few, &values, sizeof values);
    copy_few<kCount / 2>(few, n, x);
  }
}

// `n` <= kLanesOf<V> elements are read or written; the other lanes read as zero.
template <Vector V>
CALDERA_INLINE V load(const float* x, int64_t n = kLanesOf<V>) {
  return read_some<V>(x, n);
}
template <Vector V>
CALDERA_INLINE void store(float* x, const V& v, int64_t n = kLanesOf<V>) {
  write_some(x, v, n);
}
template <Vector V>
CALDERA_INLINE V load(const c10::BFloat16* x, int64_t n = kLanesOf<V>) {
  const auto halves = read_some<typename TypesOf<V>::HalfBits>(x, n);
  return reinterpret_cast<V>(__builtin_convertvector(halves, BitsOf<V>) << 16);
}
template <Vector V>
CALDERA_INLINE V load(const int8_t* x, int64_t n = kLanesOf<V>) {
  // Widened twice at a time: the compiler has instructions for each step, and none for several.
  const auto bytes = read_some<typename TypesOf<V>::Bytes>(x, n);
  const auto shorts = __builtin_convertvector(bytes, typename TypesOf<V>::Shorts);
  return __builtin_convertvector(__builtin_convertvector(shorts, typename TypesOf<V>::Ints), V);
}
// Rounded to nearest even in the upper halves, whatever is below; NaN stays NaN.
template <Vector V>
CALDERA_INLINE BitsOf<V> rounded_to_bfloat16(const V& v) {
  const auto bits = reinterpret_cast<BitsOf<V>>(v);
  return v != v ? BitsOf<V>{} + 0x7FC00000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
}
template <Vector V>
CALDERA_INLINE void store(c10::BFloat16* x, const V& v, int64_t n = kLanesOf<V>) {
  write_some(x, __builtin_convertvector(rounded_to_bfloat16(v) >> 16, typename TypesOf<V>::HalfBits), n);
}

// Twice as many elements, those of even and of odd places where two share a 32-bit word: bfloat16 is read and
// written without moving anything between lanes.
template <Vector V>
struct Two {
  V first, second;
};
template <Vector V>
CALDERA_INLINE Two<V> load_two(const float* x) {
  return {load<V>(x), load<V>(x + kLanesOf<V>)};
}
template <Vector V>
CALDERA_INLINE Two<V> load_two(const c10::BFloat16* x) {
  BitsOf<V> words;
  std::memcpy(&words, x, sizeof words);
  return {reinterpret_cast<V>(words << 16), reinterpret_cast<V>(words & 0xFFFF0000u)};
}
template <Vector V>
CALDERA_INLINE void store_two(float* x, const Two<V>& v) {
  store(x, v.first);
  store(x + kLanesOf<V>, v.second);
}
template <Vector V>
CALDERA_INLINE void store_two(c10::BFloat16* x, const Two<V>& v) {
  const BitsOf<V> words =
      (rounded_to_bfloat16(v.first) >> 16) | (rounded_to_bfloat16(v.second) & 0xFFFF0000u);
  std::memcpy(x, &words, sizeof words);
}
// y[i] = f(x[i]...) of arrays of one type; y may be one of x. f takes and returns V, and must be
// CALDERA_ALWAYS inline, as whoever calls this is compiled for several processors.
template <Vector V, class T, class Function, class... X>
CALDERA_INLINE void map(int64_t count, Function f, T* y, const X*... x) {
  int64_t i = 0;
  for (; i + 2 * kLanesOf<V> <= count; i += 2 * kLanesOf<V>)
    store_two(y + i, Two<V>{f(load_two<V>(x + i).first...), f(load_two<V>(x + i).second...)});
  for (; i < count; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, count - i);
    store(y + i, f(load<V>(x + i, n)...), n);
  }
}
// f(x[i]...) of all vectors of arrays of one type, their elements in any order; lanes beyond the end are
// zero.
template <Vector V, class Function, class... X>
CALDERA_INLINE void for_each_vector(int64_t count, Function f, const X*... x) {
  int64_t i = 0;
  for (; i + 2 * kLanesOf<V> <= count; i += 2 * kLanesOf<V>) {
    f(load_two<V>(x + i).first...);
    f(load_two<V>(x + i).second...);
  }
  for (; i < count; i += kLanesOf<V>) f(load<V>(x + i, std::min(kLanesOf<V>, count - i))...);
}

template <Vector V>
CALDERA_INLINE V max(const V& a, const V& b) {
  return a > b ? a : b;
}
template <Vector V>
CALDERA_INLINE V min(const V& a, const V& b) {
  return a < b ? a : b;
}
template <Vector V>
CALDERA_INLINE V sqrt(const V& x) {
  V y;
  for (int64_t i = 0; i < kLanesOf<V>; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}
// All lanes in one, halves first.
template <Vector V, class Combine>
CALDERA_INLINE float folded(const V& v, Combine combine) {
  if constexpr (kLanesOf<V> == 4) {
    return combine(combine(v[0], v[2]), combine(v[1], v[3]));
  } else {
    typename Types<kLanesOf<V> / 2>::Vec halves[2];
    std::memcpy(halves, &v, sizeof v);
    return folded(combine(halves[0], halves[1]), combine);
  }
}
template <Vector V>
CALDERA_INLINE float sum(const V& v) {
  return folded(v, [](const auto& a, const auto& b) CALDERA_ALWAYS { return a + b; });
}
template <Vector V>
CALDERA_INLINE float maximum(const V& v) {
  return folded(v, [](const auto& a, const auto& b) CALDERA_ALWAYS { return a > b ? a : b; });
}

// e^x to 2 units in the last place, for x <= 88. Exactly 0 below -60: softmax terms so small change no sum,
// and products of them would be denormal numbers, which make a matrix product many times slower.
template <Vector V>
CALDERA_INLINE V exp(const V& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const V shifted = x * 1.44269504f + kRound;
  const V n = shifted - kRound;
  const V r = x - n * 0.693359375f + n * 2.12194440e-4f;
  V p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const BitsOf<V> exponent = (reinterpret_cast<BitsOf<V>>(shifted) - 0x4B400000u) << 23;
  const V result = reinterpret_cast<V>(reinterpret_cast<BitsOf<V>>(p) + exponent);
  const V flushed = x < -60.0f ? V{} : result;
  return x != x ? x : flushed;
}

// 1 / (1 + e^-x). (By Newton's method the reciprocal takes longer than a division, beside which the rest
// runs.)
template <Vector V>
CALDERA_INLINE V sigmoid(const V& x) {
  return 1.0f / (1.0f + exp(min(V(-x), splat<V>(87.0f))));
}

}  // namespace caldera::simd
