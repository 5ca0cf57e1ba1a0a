#include <cfloat>

#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {
namespace {

// Updates both moments by the gradient (already scaled) and returns the new weight.
__device__ inline float updated(float w, float& m, float& v, float g, const AdamWFactors& f) {
  m += f.one_minus_beta1 * (g - m);
  v = v * f.beta2 + f.one_minus_beta2 * g * g;
  return w * f.decay - f.step_size * m / (sqrtf(v) * f.inverse_correction2 + f.epsilon);
}

template <int kN>
__device__ inline Floats<kN> load_weights(const Weights& weights, int64_t i) {
  if (weights.whole) return load<kN>(weights.whole + i);
  Floats<kN> values = load<kN>(weights.weight + i);
  if (!weights.remainder) return values;
  const Pack<int16_t, kN> low = pack_at<kN>(static_cast<const int16_t*>(weights.remainder) + i);
  CALDERA_UNROLL
  for (int k = 0; k < kN; ++k)
    values[k] = __uint_as_float(__float_as_uint(values[k]) + static_cast<uint32_t>(int32_t{low.values[k]}));
  return values;
}
// Where the weights are whole or have a remainder.
template <int kN>
__device__ inline void store_weights(const Weights& weights, int64_t i, const Floats<kN>& values) {
  if (weights.whole) return store(weights.whole + i, values);
  Pack<Bf16, kN> high;
  Pack<int16_t, kN> low;
  CALDERA_UNROLL
  for (int k = 0; k < kN; ++k) {
    const uint32_t bits = __float_as_uint(values[k]);
    high.values[k].bits = static_cast<uint16_t>(values[k] != values[k] ? 0x7FC0u : (bits + 0x8000u) >> 16);
    low.values[k] = static_cast<int16_t>(bits);
  }
  pack_at<kN>(weights.weight + i) = high;
  pack_at<kN>(weights.remainder + i) = low;
}

template <class T, int kN>
__global__ void adamw_kernel(Weights weights, float* exp_avg, float* exp_avg_sq, const T* gradient, int64_t count,
                             AdamWFactors f) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN;
  if (i >= count) return;
  Floats<kN> g = {};
  if (gradient) g = load<kN>(gradient + i);
  Floats<kN> m = load<kN>(exp_avg + i), v = load<kN>(exp_avg_sq + i), w = load_weights<kN>(weights, i);
  CALDERA_UNROLL
  for (int k = 0; k < kN; ++k) w[k] = updated(w[k], m.values[k], v.values[k], g[k] * f.grad_scale, f);
  store(exp_avg + i, m);
  store(exp_avg_sq + i, v);
  store_weights(weights, i, w);
}

static_assert(kCodesPerScale == kThreads);  // a thread takes an element of a range that shares a scale
constexpr int64_t kRangesEach = 16;         // such ranges of a block, for which the maps are read once

// The code of the nearest of the map's 256 values, the lower one of two that are as near.
__device__ inline uint8_t nearest_code(const float* map, float value) {
  int code = 0;  // of the middles between two values, as many lie below `value`
  CALDERA_UNROLL
  for (int step = 128; step > 0; step /= 2)
    if ((map[code + step - 1] + map[code + step]) / 2 < value) code += step;
  return static_cast<uint8_t>(code);
}

// Writes the range's values as codes and returns, to every thread, their scale.
__device__ inline float encode(const float* map, float value, uint8_t* code) {
  const float scale = over_block(fabsf(value), Max());
  if (code) *code = nearest_code(map, value * (1.0f / fmaxf(scale, FLT_MIN)));
  return scale;
}

// adamw_compact.cpp's hash, whose upper half decides which way element `index` is rounded.
__device__ inline Bf16 rounded_by_noise(float value, uint32_t index, const CompactNoise& noise) {
  uint32_t hash = index ^ noise.first_word;
  hash ^= hash >> 16;
  hash *= 0x7FEB352Du;
  hash ^= hash >> 15;
  hash += noise.second_word;
  hash *= 0x846CA68Bu;
  const uint32_t bits = __float_as_uint(value);
  const bool is_finite = (bits & 0x7F800000u) != 0x7F800000u;
  return {static_cast<uint16_t>((is_finite ? bits + (hash >> 16) : bits) >> 16)};
}

template <class T>
__global__ void compact_kernel(CompactState s, const T* gradient, const float* maps, int64_t count,
                               AdamWFactors f, CompactNoise noise) {
  __shared__ float m_map[kThreads], v_map[kThreads];
  m_map[threadIdx.x] = load<1>(maps + threadIdx.x)[0];
  v_map[threadIdx.x] = load<1>(maps + kThreads + threadIdx.x)[0];
  __syncthreads();
  for (int64_t range = blockIdx.x * kRangesEach; range < (blockIdx.x + 1) * kRangesEach; ++range) {
    if (range * kThreads >= count) return;
    const int64_t i = range * kThreads + threadIdx.x;
    const bool is_there = i < count;  // the others count as zeros
    float m = 0, v = 0;
    if (is_there) {
      const float g = gradient ? load<1>(gradient + i)[0] * f.grad_scale : 0.0f;
      m = s.exp_avg ? load<1>(s.exp_avg + i)[0] : m_map[s.exp_avg_codes[i]] * s.exp_avg_scale[range];
      v = s.exp_avg_sq ? load<1>(s.exp_avg_sq + i)[0]
                       : v_map[s.exp_avg_sq_codes[i]] * s.exp_avg_sq_scale[range];
      const float w = updated(load_weights<1>(s.weights, i)[0], m, v, g, f);
      if (s.weights.whole || s.weights.remainder)
        store_weights(s.weights, i, Floats<1>{w});
      else
        s.weights.weight[i] = rounded_by_noise(w, noise.first_index + static_cast<uint32_t>(i), noise);
      if (s.exp_avg) store(s.exp_avg + i, Floats<1>{m});
      if (s.exp_avg_sq) store(s.exp_avg_sq + i, Floats<1>{v});
    }
    // The scales were read by all before they change: encode() has all threads meet.
    if (s.exp_avg_codes) {
      const float scale = encode(m_map, m, is_there ? s.exp_avg_codes + i : nullptr);
      if (threadIdx.x == 0) s.exp_avg_scale[range] = scale;
    }
    if (s.exp_avg_sq_codes) {
      const float scale = encode(v_map, v, is_there ? s.exp_avg_sq_codes + i : nullptr);
      if (threadIdx.x == 0) s.exp_avg_sq_scale[range] = scale;
    }
  }
}

}  // namespace

template <class T>
void adamw(const Weights& weights, float* exp_avg, float* exp_avg_sq, const T* gradient, int64_t count,
           const AdamWFactors& factors, Stream stream) {
  with_lanes<float>(
      count,
      [&](auto lanes) {
        launch("adamw", adamw_kernel<T, lanes.value>, ceil_div(count, kThreads * lanes.value), stream, weights,
               exp_avg, exp_avg_sq, gradient, count, factors);
      },
      weights.whole, weights.weight, weights.remainder, exp_avg, exp_avg_sq, gradient);
}

template <class T>
void adamw_compact(const CompactState& state, const T* gradient, const float* maps, int64_t count,
                   const AdamWFactors& factors, const CompactNoise& noise, Stream stream) {
  launch("adamw_compact", compact_kernel<T>, ceil_div(count, kCodesPerScale * kRangesEach), stream, state,
         gradient, maps, count, factors, noise);
}

template void adamw(const Weights&, float*, float*, const float*, int64_t, const AdamWFactors&, Stream);
template void adamw(const Weights&, float*, float*, const Bf16*, int64_t, const AdamWFactors&, Stream);
template void adamw_compact(const CompactState&, const float*, const float*, int64_t, const AdamWFactors&,
                            const CompactNoise&, Stream);
template void adamw_compact(const CompactState&, const Bf16*, const float*, int64_t, const AdamWFactors&,
                            const CompactNoise&, Stream);

}  // namespace caldera::CALDERA_KERNELS
