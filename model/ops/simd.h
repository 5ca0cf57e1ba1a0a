// Vector code for the CPU kernels: 16 floats at a time through the compiler's vector types, and CALDERA_SIMD,
// which compiles a function for AVX-512, AVX2 and the baseline and picks one when the program loads.
// Everything computes in float32; bfloat16 is converted on loading and storing.
#pragma once
#include <c10/util/BFloat16.h>

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
// Rounds to nearest even; NaN stays NaN.
CALDERA_INLINE void store(c10::BFloat16* x, const Vec& v, int64_t n = kLanes) {
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Bits is_nan = reinterpret_cast<Bits>(v != v);
  const HalfBits h = __builtin_convertvector((rounded & ~is_nan) | (0x7FC0u & is_nan), HalfBits);
  if (n == kLanes)
    std::memcpy(x, &h, sizeof h);
  else
    for (int64_t i = 0; i < n; ++i) x[i].x = h[i];
}

CALDERA_INLINE Vec max(const Vec& a, const Vec& b) { return a > b ? a : b; }
CALDERA_INLINE Vec min(const Vec& a, const Vec& b) { return a < b ? a : b; }
CALDERA_INLINE Vec sqrt(const Vec& x) {
  Vec y;
  for (int64_t i = 0; i < kLanes; ++i) y[i] = __builtin_sqrtf(x[i]);
  return y;
}
CALDERA_INLINE float sum(const Vec& v) {
  using Half = float __attribute__((vector_size(32)));
  using Quarter = float __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Half half = halves[0] + halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, &half, sizeof half);
  const Quarter quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}
CALDERA_INLINE float maximum(const Vec& v) {
  float best = v[0];
  for (int64_t i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
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

}  // namespace caldera::simd
