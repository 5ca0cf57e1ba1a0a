// Vector code, compiled for AVX-512, for AVX2 and for what every processor has, of which the one runs that
// cpu() allows. A kernel is a function that is CALDERA_INLINE, as is all that it calls and that should be
// compiled with it. Where it uses vectors, it is a template of their type, of which
// run<CALDERA_EACH_WIDTH(kernel, T)>() takes the one for this processor: wider ones than it has registers for
// are taken apart, and the compiler does that badly (a comparison of 16 floats becomes 16 comparisons on
// AVX2).
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#include "base/cpu.h"

// Vectors are returned by always-inlined functions only, so there is no ABI to change.
#pragma GCC diagnostic ignored "-Wpsabi"

#define CALDERA_INLINE [[gnu::always_inline]] inline
#define CALDERA_ALWAYS __attribute__((always_inline))  // of lambdas
// The same of code that is written for AVX2, in its own instructions.
#define CALDERA_AVX2 __attribute__((target("avx2,fma")))
#define CALDERA_AVX2_INLINE __attribute__((target("avx2,fma"), always_inline)) inline
#define CALDERA_AVX2_ALWAYS __attribute__((target("avx2,fma"), always_inline))  // of lambdas

namespace caldera::simd {

enum class Level { kBaseline, kAvx2, kAvx512 };

inline Level level_of(const CpuDescription& cpu) {
  return cpu.avx512 ? Level::kAvx512 : cpu.avx2 ? Level::kAvx2 : Level::kBaseline;
}
inline Level level() {
  static const Level result = level_of(cpu());
  return result;
}

template <auto Kernel>
struct Compiled;
template <class Result, class... Parameters, Result (*Kernel)(Parameters...)>
struct Compiled<Kernel> {
#ifdef __x86_64__
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi,bmi2"))) static Result
  on_avx512(Parameters... x) {
    return Kernel(x...);
  }
  __attribute__((target("avx2,fma,f16c,bmi,bmi2"))) static Result on_avx2(Parameters... x) {
    return Kernel(x...);
  }
#endif
  static Result on_baseline(Parameters... x) { return Kernel(x...); }

  static Result on_this_cpu(Parameters... x) {
#ifdef __x86_64__
    if (level() == Level::kAvx512) return on_avx512(x...);
    if (level() == Level::kAvx2) return on_avx2(x...);
#endif
    return on_baseline(x...);
  }
};

// run<kernel>(x, y) is kernel(x, y), compiled for this processor.
template <auto Kernel, class... Arguments>
CALDERA_INLINE decltype(auto) run(Arguments&&... x) {
  return Compiled<Kernel>::on_this_cpu(std::forward<Arguments>(x)...);
}

// The same of three kernels: for AVX-512, for AVX2 and for what every processor has.
template <auto Wide, auto Middle, auto Narrow, class... Arguments>
CALDERA_INLINE decltype(auto) run(Arguments&&... x) {
#ifdef __x86_64__
  if (level() == Level::kAvx512) return Compiled<Wide>::on_avx512(std::forward<Arguments>(x)...);
  if (level() == Level::kAvx2) return Compiled<Middle>::on_avx2(std::forward<Arguments>(x)...);
#endif
  return Compiled<Narrow>::on_baseline(std::forward<Arguments>(x)...);
}

// Vectors of kCount elements. (As typedefs, because the compiler ignores the size in a template's `using`.)
template <int64_t kCount>
struct Types {
  typedef float Vec __attribute__((vector_size(4 * kCount)));
  typedef uint32_t Bits __attribute__((vector_size(4 * kCount)));
  typedef int32_t Ints __attribute__((vector_size(4 * kCount)));
  typedef uint16_t HalfBits __attribute__((vector_size(2 * kCount)));
  typedef int16_t Shorts __attribute__((vector_size(2 * kCount)));
  typedef int8_t Bytes __attribute__((vector_size(kCount)));
};
using Vec16 = Types<16>::Vec;
using Vec8 = Types<8>::Vec;
using Vec4 = Types<4>::Vec;
template <class V>
concept Vector = std::is_same_v<V, Vec16> || std::is_same_v<V, Vec8> || std::is_same_v<V, Vec4>;

template <Vector V>
inline constexpr int64_t kLanesOf = sizeof(V) / sizeof(float);
template <Vector V>
using TypesOf = Types<kLanesOf<V>>;
template <Vector V>
using BitsOf = typename TypesOf<V>::Bits;

}  // namespace caldera::simd

// kernel<V, ...> for 16, 8 and 4 floats at a time.
#define CALDERA_EACH_WIDTH(kernel, ...)                       \
  kernel<caldera::simd::Vec16 __VA_OPT__(, ) __VA_ARGS__>,    \
      kernel<caldera::simd::Vec8 __VA_OPT__(, ) __VA_ARGS__>, \
      kernel<caldera::simd::Vec4 __VA_OPT__(, ) __VA_ARGS__>
