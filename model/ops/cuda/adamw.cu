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

constexpr int64_t kRangesEach = 64;  // of kCodesPerScale elements, of a block, for which it reads the tables once

// The code of the nearest of the table's values, the lower one of two that are as near.
template <int kSigns>
__device__ inline uint8_t nearest_code(const CodeTable<kSigns>& table, float value) {
  const uint32_t bits = __float_as_uint(value);
  int cell = static_cast<int>((bits & 0x7FFFFFFFu) >> 16) - kFirstCell;
  cell = cell < 0 ? 0 : cell < kNumCells ? cell : kNumCells - 1;
  if (kSigns == 2 && bits >> 31 != 0) cell += kNumCells;
  const uint8_t code = table.lowest[cell];
  return static_cast<uint8_t>(code + (value > table.middles[code] ? 1 : 0));
}

template <int kSigns, int kN>
__device__ inline Floats<kN> decoded(const Pack<uint8_t, kN>& codes, const CodeTable<kSigns>& table, float scale) {
  Floats<kN> values;
  CALDERA_UNROLL
  for (int k = 0; k < kN; ++k) values[k] = table.values[codes.values[k]] * scale;
  return values;
}

// Writes what the lanes of a warp hold of a range as codes, and their scale.
template <int kSigns, int kN, int kPacks>
__device__ inline void store_codes(uint8_t* codes, float* scale, const CodeTable<kSigns>& table,
                                   const Floats<kN> (&values)[kPacks], int64_t first, int64_t count) {
  float most = 0;
  CALDERA_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) most = fmaxf(most, fabsf(values[p][k]));
  }
  most = over_warp(most, Max());
  const float factor = 1.0f / fmaxf(most, FLT_MIN);
  CALDERA_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int64_t i = first + p * kWarp * kN;
    if (i >= count) continue;
    Pack<uint8_t, kN> pack;
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) pack.values[k] = nearest_code(table, values[p][k] * factor);
    pack_at<kN>(codes + i) = pack;
  }
  if (threadIdx.x % kWarp == 0) *scale = most;
}

// The noise's upper half decides which way element `index` is rounded.
__device__ inline Bf16 rounded_by_noise(float value, uint32_t index, const NoiseWords& words) {
  const uint32_t hash = noise_of(index, words);
  const uint32_t bits = __float_as_uint(value);
  const bool is_finite = (bits & 0x7F800000u) != 0x7F800000u;
  return {static_cast<uint16_t>((is_finite ? bits + (hash >> 16) : bits) >> 16)};
}

// A warp takes a range that shares scales: each of its lanes kN elements at a time. `count` is a multiple of kN.
template <class T, int kN>
__device__ inline void update_range(const CompactState& s, const T* gradient, const CodeTables& tables, int64_t range,
                                    int64_t count, const AdamWFactors& f, const CompactNoise& noise) {
  constexpr int kPacks = static_cast<int>(kCodesPerScale) / (kWarp * kN);
  const int64_t first = range * kCodesPerScale + threadIdx.x % kWarp * kN;
  // All loads are on their way before anything waits for one. What lies behind the end counts as zeros.
  Floats<kN> w[kPacks] = {}, g[kPacks] = {}, m[kPacks] = {}, v[kPacks] = {};
  Pack<uint8_t, kN> m_codes[kPacks] = {}, v_codes[kPacks] = {};
  const float m_scale = s.exp_avg ? 0.0f : s.exp_avg_scale[range];
  const float v_scale = s.exp_avg_sq ? 0.0f : s.exp_avg_sq_scale[range];
  CALDERA_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int64_t i = first + p * kWarp * kN;
    if (i >= count) continue;
    w[p] = load_weights<kN>(s.weights, i);
    if (gradient) g[p] = load<kN>(gradient + i);
    if (s.exp_avg) m[p] = load<kN>(s.exp_avg + i);
    if (s.exp_avg_sq) v[p] = load<kN>(s.exp_avg_sq + i);
    if (s.exp_avg_codes) m_codes[p] = pack_at<kN>(s.exp_avg_codes + i);
    if (s.exp_avg_sq_codes) v_codes[p] = pack_at<kN>(s.exp_avg_sq_codes + i);
  }
  CALDERA_UNROLL
  for (int p = 0; p < kPacks; ++p) {
    const int64_t i = first + p * kWarp * kN;
    if (s.exp_avg_codes && i < count) m[p] = decoded(m_codes[p], tables.exp_avg, m_scale);
    if (s.exp_avg_sq_codes && i < count) v[p] = decoded(v_codes[p], tables.exp_avg_sq, v_scale);
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) w[p][k] = updated(w[p][k], m[p][k], v[p][k], g[p][k] * f.grad_scale, f);
    if (i >= count) continue;
    if (s.weights.whole || s.weights.remainder) {
      store_weights(s.weights, i, w[p]);
    } else {
      Pack<Bf16, kN> pack;
      CALDERA_UNROLL
      for (int k = 0; k < kN; ++k)
        pack.values[k] = rounded_by_noise(w[p][k], noise.first_index + static_cast<uint32_t>(i + k), noise.words);
      pack_at<kN>(s.weights.weight + i) = pack;
    }
    if (s.exp_avg) store(s.exp_avg + i, m[p]);
    if (s.exp_avg_sq) store(s.exp_avg_sq + i, v[p]);
  }
  if (s.exp_avg_codes) store_codes(s.exp_avg_codes, s.exp_avg_scale + range, tables.exp_avg, m, first, count);
  if (s.exp_avg_sq_codes)
    store_codes(s.exp_avg_sq_codes, s.exp_avg_sq_scale + range, tables.exp_avg_sq, v, first, count);
}

template <class T, int kN>
__global__ void compact_kernel(CompactState s, const T* gradient, const CodeTables* tables, int64_t count,
                               AdamWFactors f, CompactNoise noise) {
  __shared__ CodeTables near;  // what all threads look up at random
  constexpr unsigned kWords = sizeof(CodeTables) / sizeof(uint32_t);
  for (unsigned i = threadIdx.x; i < kWords; i += kThreads)
    reinterpret_cast<uint32_t*>(&near)[i] = reinterpret_cast<const uint32_t*>(tables)[i];
  __syncthreads();
  const int64_t begin = blockIdx.x * kRangesEach, last = (count - 1) / kCodesPerScale;
  for (int64_t range = begin + threadIdx.x / kWarp; range < begin + kRangesEach && range <= last; range += kThreads / kWarp)
    update_range<T, kN>(s, gradient, near, range, count, f, noise);
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
void adamw_compact(const CompactState& state, const T* gradient, const CodeTables* tables, int64_t count,
                   const AdamWFactors& factors, const CompactNoise& noise, Stream stream) {
  with_lanes<float>(
      count,
      [&](auto lanes) {
        launch("adamw_compact", compact_kernel<T, lanes.value>, ceil_div(count, kCodesPerScale * kRangesEach), stream,
               state, gradient, tables, count, factors, noise);
      },
      state.weights.whole, state.weights.weight, state.weights.remainder, state.exp_avg, state.exp_avg_sq,
      state.exp_avg_codes, state.exp_avg_sq_codes, gradient);
}

template void adamw(const Weights&, float*, float*, const float*, int64_t, const AdamWFactors&, Stream);
template void adamw(const Weights&, float*, float*, const Bf16*, int64_t, const AdamWFactors&, Stream);
template void adamw_compact(const CompactState&, const float*, const CodeTables*, int64_t, const AdamWFactors&,
                            const CompactNoise&, Stream);
template void adamw_compact(const CompactState&, const Bf16*, const CodeTables*, int64_t, const AdamWFactors&,
                            const CompactNoise&, Stream);

}  // namespace caldera::CALDERA_KERNELS
