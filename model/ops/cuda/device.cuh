// What the kernels are made of: loads and stores of up to 16 bytes, sums over a warp and a block, launching.
#pragma once
#include "model/ops/cuda/kernels.h"

// In front of loops: wholly (so that what a thread works on stays in registers), or four steps at once (so
// that four loads are on their way).
#ifdef __CUDACC__
#define CALDERA_UNROLL _Pragma("unroll")
#define CALDERA_UNROLL_4 _Pragma("unroll 4")
#else
#define CALDERA_UNROLL
#define CALDERA_UNROLL_4
#endif

// The tests' way to look at every load and store.
#ifndef CALDERA_CHECK_ACCESS
#define CALDERA_CHECK_ACCESS(address, bytes)
#endif

namespace caldera::CALDERA_KERNELS {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;  // of every block

// The values that a thread works on at a time.
template <int kN>
struct Floats {
  float values[kN];
  __device__ float& operator[](int i) { return values[i]; }
  __device__ float operator[](int i) const { return values[i]; }
};

// N elements that move by one instruction (of at most 16 bytes), from and to multiples of their size.
template <class T, int kN>
struct alignas(sizeof(T) * kN) Pack {
  T values[kN];
};
template <int kN, class T>
__device__ Pack<T, kN>& pack_at(T* x) {
  CALDERA_CHECK_ACCESS(x, sizeof(Pack<T, kN>));
  return *reinterpret_cast<Pack<T, kN>*>(x);
}
template <int kN, class T>
__device__ const Pack<T, kN>& pack_at(const T* x) {
  CALDERA_CHECK_ACCESS(x, sizeof(Pack<T, kN>));
  return *reinterpret_cast<const Pack<T, kN>*>(x);
}

// low and high rounded to nearest even bfloat16, in the low and the high half. (One instruction from sm_80
// on.)
__device__ inline uint32_t round_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  const auto rounded = [](float x) -> uint32_t {
    const uint32_t bits = __float_as_uint(x);
    return x != x ? 0x7FFFu : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
#endif
}

template <int kN>
__device__ Floats<kN> load(const float* x) {
  const Pack<float, kN> pack = pack_at<kN>(x);
  Floats<kN> result;
  CALDERA_UNROLL
  for (int i = 0; i < kN; ++i) result[i] = pack.values[i];
  return result;
}
template <int kN>
__device__ Floats<kN> load(const Bf16* x) {
  const Pack<Bf16, kN> pack = pack_at<kN>(x);
  Floats<kN> result;
  CALDERA_UNROLL
  for (int i = 0; i < kN; ++i) result[i] = __uint_as_float(static_cast<uint32_t>(pack.values[i].bits) << 16);
  return result;
}
template <int kN>
__device__ void store(float* x, const Floats<kN>& values) {
  Pack<float, kN> pack;
  CALDERA_UNROLL
  for (int i = 0; i < kN; ++i) pack.values[i] = values[i];
  pack_at<kN>(x) = pack;
}
template <int kN>
__device__ void store(Bf16* x, const Floats<kN>& values) {
  Pack<Bf16, kN> pack;
  if constexpr (kN == 1) {
    pack.values[0].bits = static_cast<uint16_t>(round_pair(values[0], 0));
  } else {
    CALDERA_UNROLL
    for (int i = 0; i < kN; i += 2) {
      const uint32_t pair = round_pair(values[i], values[i + 1]);
      pack.values[i].bits = static_cast<uint16_t>(pair);
      pack.values[i + 1].bits = static_cast<uint16_t>(pair >> 16);
    }
  }
  pack_at<kN>(x) = pack;
}

// The values as they read once they are stored as T.
template <class T, int kN>
__device__ Floats<kN> rounded(Floats<kN> values) {
  if constexpr (sizeof(T) == sizeof(Bf16)) {
    CALDERA_UNROLL
    for (int i = 0; i < kN; ++i) values[i] = __uint_as_float(round_pair(0, values[i]) & 0xFFFF0000u);
  }
  return values;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// model/ops/noise.h's noise_words(), by base/rng.h's mix64().
__device__ inline NoiseWords words_of(uint64_t key) {
  key += 0x9E3779B97F4A7C15ull;
  key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9ull;
  key = (key ^ (key >> 27)) * 0x94D049BB133111EBull;
  key ^= key >> 31;
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// model/ops/noise.h's, of one element.
__device__ inline uint32_t noise_of(uint32_t index, const NoiseWords& words) {
  uint32_t hash = index ^ words.first;
  hash ^= hash >> 16;
  hash *= NoiseWords::kMultiply1;
  hash ^= hash >> 15;
  hash += words.second;
  return hash * NoiseWords::kMultiply2;
}

struct Sum {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Every thread of the warp gets the same result, bit for bit.
template <class Combine>
__device__ float over_warp(float x, Combine combine) {
  CALDERA_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    x = combine(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  return x;
}
// The same for the block; all its threads must come here.
template <class Combine>
__device__ float over_block(float x, Combine combine) {
  __shared__ float parts[kThreads / kWarp];
  x = over_warp(x, combine);
  __syncthreads();  // someone may still read the parts of the call before
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = parts[0];
  CALDERA_UNROLL
  for (int i = 1; i < kThreads / kWarp; ++i) x = combine(x, parts[i]);
  return x;
}

#ifdef __CUDACC__
// As many blocks of kThreads as told, queued on the stream.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t num_blocks, Stream stream,
            Arguments... arguments) {
  if (num_blocks == 0) return;
  kernel<<<static_cast<unsigned>(num_blocks), kThreads, 0, stream>>>(arguments...);
  check_launch(name, cudaGetLastError());
}
#endif

template <int kN>
struct Lanes {
  static constexpr int value = kN;
};

// Calls f(Lanes<N>), N elements at a time: 16 bytes of T if `count` and all the addresses allow it, else one.
template <class T, class Function, class... Pointers>
void with_lanes(int64_t count, Function f, const Pointers*... pointers) {
  constexpr int kN = 16 / sizeof(T);
  const auto aligned = [](const auto* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % (kN * sizeof(*pointer)) == 0;
  };
  if (count % kN == 0 && (aligned(pointers) && ...))
    f(Lanes<kN>{});
  else
    f(Lanes<1>{});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace caldera::CALDERA_KERNELS
