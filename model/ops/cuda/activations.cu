// SwiGLU, quick GELU and dropout.
#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {
namespace {

// A block takes a row.
template <class T, int kN>
__global__ void swiglu_forward_kernel(const T* gate_up, T* y, int64_t width) {
  const int64_t row = blockIdx.x;
  gate_up += row * 2 * width;
  y += row * width;
  for (int64_t i = threadIdx.x * kN; i < width; i += kThreads * kN) {
    const Floats<kN> gate = load<kN>(gate_up + i), up = load<kN>(gate_up + width + i);
    Floats<kN> out;
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) out[k] = gate[k] * sigmoid(gate[k]) * up[k];
    store(y + i, out);
  }
}

// d silu(g) = s + g * s * (1 - s), s = sigmoid(g).
template <class T, int kN>
__global__ void swiglu_backward_kernel(const T* gate_up, const T* dy, T* d_gate_up, int64_t width) {
  const int64_t row = blockIdx.x;
  gate_up += row * 2 * width;
  d_gate_up += row * 2 * width;
  dy += row * width;
  for (int64_t i = threadIdx.x * kN; i < width; i += kThreads * kN) {
    const Floats<kN> gate = load<kN>(gate_up + i), up = load<kN>(gate_up + width + i),
                     grad = load<kN>(dy + i);
    Floats<kN> d_gate, d_up;
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) {
      const float s = sigmoid(gate[k]), silu = gate[k] * s;
      d_gate[k] = grad[k] * up[k] * (s + silu * (1.0f - s));
      d_up[k] = grad[k] * silu;
    }
    store(d_gate_up + i, d_gate);
    store(d_gate_up + width + i, d_up);
  }
}

// A block takes a row.
template <class T, int kN>
__global__ void dropout_kernel(const T* x, T* y, const int64_t* keys, uint64_t seed, int64_t width, uint32_t threshold,
                               float scale) {
  const int64_t row = blockIdx.x;
  const NoiseWords words = words_of(static_cast<uint64_t>(keys[row]) ^ seed);
  x += row * width;
  y += row * width;
  for (int64_t i = threadIdx.x * kN; i < width; i += kThreads * kN) {
    Floats<kN> v = load<kN>(x + i);
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k)
      v[k] = noise_of(static_cast<uint32_t>(i + k), words) >= threshold ? v[k] * scale : 0.0f;
    store(y + i, v);
  }
}

constexpr float kQuick = 1.702f;

template <class T, int kN>
__global__ void quick_gelu_forward_kernel(const T* x, T* y, int64_t count) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN;
  if (i >= count) return;
  Floats<kN> v = load<kN>(x + i);
  CALDERA_UNROLL
  for (int k = 0; k < kN; ++k) v[k] = v[k] * sigmoid(kQuick * v[k]);
  store(y + i, v);
}

template <class T, int kN>
__global__ void quick_gelu_backward_kernel(const T* x, const T* dy, T* dx, int64_t count) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN;
  if (i >= count) return;
  const Floats<kN> v = load<kN>(x + i);
  Floats<kN> grad = load<kN>(dy + i);
  CALDERA_UNROLL
  for (int k = 0; k < kN; ++k) {
    const float s = sigmoid(kQuick * v[k]);
    grad[k] = grad[k] * (s + kQuick * v[k] * s * (1.0f - s));
  }
  store(dx + i, grad);
}

}  // namespace

template <class T>
void swiglu_forward(const T* gate_up, T* y, int64_t rows, int64_t width, Stream stream) {
  with_lanes<T>(
      width,
      [&](auto lanes) {
        launch("swiglu_forward", swiglu_forward_kernel<T, lanes.value>, rows, stream, gate_up, y, width);
      },
      gate_up, y);
}

template <class T>
void swiglu_backward(const T* gate_up, const T* dy, T* d_gate_up, int64_t rows, int64_t width,
                     Stream stream) {
  with_lanes<T>(
      width,
      [&](auto lanes) {
        launch("swiglu_backward", swiglu_backward_kernel<T, lanes.value>, rows, stream, gate_up, dy,
               d_gate_up, width);
      },
      gate_up, dy, d_gate_up);
}

template <class T>
void quick_gelu_forward(const T* x, T* y, int64_t count, Stream stream) {
  with_lanes<T>(
      count,
      [&](auto lanes) {
        launch("quick_gelu_forward", quick_gelu_forward_kernel<T, lanes.value>,
               ceil_div(count, kThreads * lanes.value), stream, x, y, count);
      },
      x, y);
}

template <class T>
void quick_gelu_backward(const T* x, const T* dy, T* dx, int64_t count, Stream stream) {
  with_lanes<T>(
      count,
      [&](auto lanes) {
        launch("quick_gelu_backward", quick_gelu_backward_kernel<T, lanes.value>,
               ceil_div(count, kThreads * lanes.value), stream, x, dy, dx, count);
      },
      x, dy, dx);
}

template void swiglu_forward(const float*, float*, int64_t, int64_t, Stream);
template void swiglu_forward(const Bf16*, Bf16*, int64_t, int64_t, Stream);
template void swiglu_backward(const float*, const float*, float*, int64_t, int64_t, Stream);
template void swiglu_backward(const Bf16*, const Bf16*, Bf16*, int64_t, int64_t, Stream);
template void quick_gelu_forward(const float*, float*, int64_t, Stream);
template void quick_gelu_forward(const Bf16*, Bf16*, int64_t, Stream);
template void quick_gelu_backward(const float*, const float*, float*, int64_t, Stream);
template void quick_gelu_backward(const Bf16*, const Bf16*, Bf16*, int64_t, Stream);

template <class T>
void dropout(const T* x, T* y, const int64_t* keys, uint64_t seed, int64_t rows, int64_t width, uint32_t threshold,
             float scale, Stream stream) {
  with_lanes<T>(
      width,
      [&](auto lanes) {
        launch("dropout", dropout_kernel<T, lanes.value>, rows, stream, x, y, keys, seed, width, threshold, scale);
      },
      x, y);
}

template void dropout(const float*, float*, const int64_t*, uint64_t, int64_t, int64_t, uint32_t, float, Stream);
template void dropout(const Bf16*, Bf16*, const int64_t*, uint64_t, int64_t, int64_t, uint32_t, float, Stream);

}  // namespace caldera::CALDERA_KERNELS
