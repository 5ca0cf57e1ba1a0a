// Vector code for the CPU kernels: 16 floats at a time through the compiler's vector types, and CALDERA_SIMD,
// which compiles a function for AVX-512, AVX2 and the baseline and picks one when the program loads.
// Everything computes in float32; bfloat16 is converted on loading and storing.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

// Values are returned by always-inlined functions only, so there is no ABI to change.
#pragma GCC diagnostic ignored "-Wpsabi"

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define CALDERA_SIMD __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CALDERA_SIMD
#endif
#define CALDERA_INLINE [[gnu::always_inline]] inline
#define CALDERA_ALWAYS __attribute__((always_inline))  // of lambdas

namespace caldera::simd {

inline constexpr int64_t kLanes = 16;
using Vec = float __attribute__((vector_size(64)));
using Bits = uint32_t __attribute__((vector_size(64)));
using HalfBits = uint16_t __attribute__((vector_size(32)));
using Bytes = int8_t __attribute__((vector_size(16)));
using Shorts = int16_t __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(64)));

CALDERA_INLINE Vec splat(float x) { return x - Vec{}; }

// `n` <= kLanes elements are read or written; the other lanes read as zero.
CALDERA_INLINE Vec load(const float* x, int64_t n = kLanes) {
  Vec v = {};
  if (n == kLanes)
    std::memcpy(&v, x, sizeof v);
  else
    for (int64_t i = 0; i < n; ++i) v[i] = x[i];
  return v;
}
CALDERA_INLINE void store(float* x, const Vec& v, int64_t n = kLanes) {
  if (n == kLanes)
    std::memcpy(x, &v, sizeof v);
  else
    for (int64_t i = 0; i < n; ++i) x[i] = v[i];
}
CALDERA_INLINE Vec load(const c10::BFloat16* x, int64_t n = kLanes) {
  HalfBits h = {};
  if (n == kLanes)
    std::memcpy(&h, x, sizeof h);
  else
    for (int64_t i = 0; i < n; ++i) h[i] = x[i].x;
  return reinterpret_cast<Vec>(__builtin_convertvector(h, Bits) << 16);
}
CALDERA_INLINE Vec load(const int8_t* x, int64_t n = kLanes) {
  Bytes b = {};
  if (n == kLanes)
    std::memcpy(&b, x, sizeof b);
  else
    for (int64_t i = 0; i < n; ++i) b[i] = x[i];
  // Widened twice at a time: the compiler has instructions for each step, and none for several.
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, Shorts), Ints), Vec);
}
// Rounded to nearest even in the upper halves, whatever is below; NaN stays NaN.
CALDERA_INLINE Bits rounded_to_bfloat16(const Vec& v) {
  const Bits bits = reinterpret_cast<Bits>(v), is_nan = reinterpret_cast<Bits>(v != v);
  return ((bits + 0x7FFFu + ((bits >> 16) & 1u)) & ~is_nan) | (0x7FC00000u & is_nan);
}
CALDERA_INLINE void store(c10::BFloat16* x, const Vec& v, int64_t n = kLanes) {
  const HalfBits h = __builtin_convertvector(rounded_to_bfloat16(v) >> 16, HalfBits);
  if (n == kLanes)
    std::memcpy(x, &h, sizeof h);
  else
    for (int64_t i = 0; i < n; ++i) x[i].x = h[i];
}

// 2 * kLanes elements, those of even and of odd places where two share a 32-bit word: bfloat16 is read and written without
// moving anything between lanes.
struct Two {
  Vec first, second;
};
CALDERA_INLINE Two load_two(const float* x) { return {load(x), load(x + kLanes)}; }
CALDERA_INLINE Two load_two(const c10::BFloat16* x) {
  Bits words;
  std::memcpy(&words, x, sizeof words);
  return {reinterpret_cast<Vec>(words << 16), reinterpret_cast<Vec>(words & 0xFFFF0000u)};
}
CALDERA_INLINE void store_two(float* x, const Two& v) {
  store(x, v.first);
  store(x + kLanes, v.second);
}
CALDERA_INLINE void store_two(c10::BFloat16* x, const Two& v) {
  const Bits words = (rounded_to_bfloat16(v.first) >> 16) | (rounded_to_bfloat16(v.second) & 0xFFFF0000u);
  std::memcpy(x, &words, sizeof words);
}
// y[i] = f(x[i]...) of arrays of one type; y may be one of x. f takes and returns Vec, and must be CALDERA_ALWAYS inline,
// as whoever calls this is compiled for several processors.
template <class T, class Function, class... X>
CALDERA_INLINE void map(int64_t count, Function f, T* y, const X*... x) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    store_two(y + i, Two{f(load_two(x + i).first...), f(load_two(x + i).second...)});
  for (; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    store(y + i, f(load(x + i, n)...), n);
  }
}
// f(x[i]...) of all vectors of arrays of one type, their elements in any order; lanes beyond the end are zero.
template <class Function, class... X>
CALDERA_INLINE void for_each_vector(int64_t count, Function f, const X*... x) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    f(load_two(x + i).first...);
    f(load_two(x + i).second...);
  }
  for (; i < count; i += kLanes) f(load(x + i, std::min(kLanes, count - i))...);
}

CALDERA_INLINE Vec max(const Vec& a, const Vec& b) { return a > b ? a : b; }
CALDERA_INLINE Vec min(const Vec& a, const Vec& b) { return a < b ? a : b; }
CALDERA_INLINE Vec sqrt(const Vec& x) {
  Vec y;
  for (int64_t i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}
// All lanes in one, halves first.
template <class Combine>
CALDERA_INLINE float folded(const Vec& v, Combine combine) {
  using Half = float __attribute__((vector_size(32)));
  using Quarter = float __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half half = combine(halves[0], halves[1]);
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter quarter = combine(quarters[0], quarters[1]);
  return combine(combine(quarter[0], quarter[2]), combine(quarter[1], quarter[3]));
}
CALDERA_INLINE float sum(const Vec& v) {
  return folded(v, [](const auto& a, const auto& b) CALDERA_ALWAYS { return a + b; });
}
CALDERA_INLINE float maximum(const Vec& v) {
  return folded(v, [](const auto& a, const auto& b) CALDERA_ALWAYS { return a > b ? a : b; });
}
// 1 / x to a unit or two in the last place, for x in [2^-126, 2^126]: a division takes as long as all the rest of an
// activation.
CALDERA_INLINE Vec reciprocal(const Vec& x) {
  // The exponent is negated, the mantissa's error is a twentieth; each step of Newton's method squares it.
  Vec y = reinterpret_cast<Vec>(0x7EF127EAu - reinterpret_cast<Bits>(x));
  y = y * (2.0f - x * y);
  y = y * (2.0f - x * y);
  return y * (2.0f - x * y);
}

// e^x to 2 units in the last place, for x <= 88. Exactly 0 below -60: softmax terms so small change no sum,
// and products of them would be denormal numbers, which make a matrix product many times slower.
CALDERA_INLINE Vec exp(const Vec& x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec clamped = x < -60.0f ? splat(-60.0f) : x;
  const Vec shifted = clamped * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Bits exponent = (reinterpret_cast<Bits>(shifted) - 0x4B400000u) << 23;
  const Vec result = reinterpret_cast<Vec>(reinterpret_cast<Bits>(p) + exponent);
  const Vec flushed = x < -60.0f ? Vec{} : result;
  return x != x ? x : flushed;
}

// 1 / (1 + e^-x). Not a number gives any: its users multiply by x.
CALDERA_INLINE Vec sigmoid(const Vec& x) { return reciprocal(1.0f + exp(min(-x, splat(87.0f)))); }

}  // namespace caldera::simd
