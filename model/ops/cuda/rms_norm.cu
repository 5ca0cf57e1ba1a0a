#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {
namespace {

static_assert(kRmsNormRows == kThreads / kWarp);  // each warp of a block takes a row

template <class T, int kN>
__global__ void forward_kernel(const T* __restrict__ x, const T* __restrict__ update, const T* weight, T* sum, T* y,
                               float* rstd, int64_t rows, int64_t width, float eps) {
  const int64_t row = blockIdx.x * kRmsNormRows + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  x += row * width;
  y += row * width;
  if (update) {
    update += row * width;
    sum += row * width;
  }
  float squares = 0;
  CALDERA_UNROLL_4
  for (int64_t i = lane * kN; i < width; i += kWarp * kN) {
    Floats<kN> v = load<kN>(x + i);
    if (update) {
      const Floats<kN> u = load<kN>(update + i);
      CALDERA_UNROLL
      for (int k = 0; k < kN; ++k) v[k] += u[k];
      v = rounded<T>(v);
      store(sum + i, v);
    }
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) squares += v[k] * v[k];
  }
  const T* in = update ? sum : x;  // each thread reads what it wrote
  const float r = 1.0f / sqrtf(over_warp(squares, Sum()) / static_cast<float>(width) + eps);
  if (lane == 0) rstd[row] = r;
  CALDERA_UNROLL_4
  for (int64_t i = lane * kN; i < width; i += kWarp * kN) {
    Floats<kN> v = load<kN>(in + i);
    const Floats<kN> w = load<kN>(weight + i);
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) v[k] = v[k] * r * w[k];
    store(y + i, v);
  }
}

// With x^ = x * rstd and g = dy * weight: dx = rstd * (g - x^ * mean(g * x^)), dweight = sum over rows of dy
// * x^. d_residual, where it is not null, is added to dx. First each warp finds its row's mean; then the block goes over its rows column by column, and each
// thread keeps its columns' sums.
template <class T, int kN>
__global__ void backward_kernel(const T* x, const T* weight, const float* rstd, const T* dy, const T* d_residual,
                                T* dx, float* dweight_parts, int64_t rows, int64_t width) {
  __shared__ float shrink[kRmsNormRows], scale[kRmsNormRows];
  const int64_t first = blockIdx.x * kRmsNormRows;
  const int64_t count = rows - first < kRmsNormRows ? rows - first : kRmsNormRows;
  x += first * width;
  dy += first * width;
  dx += first * width;
  if (d_residual) d_residual += first * width;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (warp < count) {
    float products = 0;
    CALDERA_UNROLL_4
    for (int64_t i = lane * kN; i < width; i += kWarp * kN) {
      const Floats<kN> v = load<kN>(x + warp * width + i), g = load<kN>(dy + warp * width + i),
                       w = load<kN>(weight + i);
      CALDERA_UNROLL
      for (int k = 0; k < kN; ++k) products += g[k] * v[k] * w[k];
    }
    products = over_warp(products, Sum());
    if (lane == 0) {
      const float r = rstd[first + warp];
      scale[warp] = r;
      shrink[warp] = products * r * r / static_cast<float>(width);
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x * kN; i < width; i += kThreads * kN) {
    const Floats<kN> w = load<kN>(weight + i);
    Floats<kN> dw = {};
    CALDERA_UNROLL_4
    for (int row = 0; row < count; ++row) {
      const Floats<kN> v = load<kN>(x + row * width + i), g = load<kN>(dy + row * width + i);
      const float r = scale[row];
      Floats<kN> d = {};
      if (d_residual) d = load<kN>(d_residual + row * width + i);
      CALDERA_UNROLL
      for (int k = 0; k < kN; ++k) {
        d[k] += r * (g[k] * w[k] - v[k] * shrink[row]);
        dw[k] += g[k] * v[k] * r;
      }
      store(dx + row * width + i, d);
    }
    if (dweight_parts) store(dweight_parts + blockIdx.x * width + i, dw);
  }
}

}  // namespace

template <class T>
void rms_norm_forward(const T* x, const T* update, const T* weight, T* sum, T* y, float* rstd, int64_t rows, int64_t width,
                      float eps, Stream stream) {
  with_lanes<T>(
      width,
      [&](auto lanes) {
        launch("rms_norm_forward", forward_kernel<T, lanes.value>, ceil_div(rows, kRmsNormRows), stream, x, update, weight,
               sum, y, rstd, rows, width, eps);
      },
      x, update, weight, sum, y);
}

template <class T>
void rms_norm_backward(const T* x, const T* weight, const float* rstd, const T* dy, const T* d_residual, T* dx,
                       float* dweight_parts, int64_t rows, int64_t width, Stream stream) {
  with_lanes<T>(
      width,
      [&](auto lanes) {
        launch("rms_norm_backward", backward_kernel<T, lanes.value>, ceil_div(rows, kRmsNormRows), stream, x, weight, rstd,
               dy, d_residual, dx, dweight_parts, rows, width);
      },
      x, weight, dy, d_residual, dx, dweight_parts);
}

template void rms_norm_forward(const float*, const float*, const float*, float*, float*, float*, int64_t, int64_t, float,
                               Stream);
template void rms_norm_forward(const Bf16*, const Bf16*, const Bf16*, Bf16*, Bf16*, float*, int64_t, int64_t, float, Stream);
template void rms_norm_backward(const float*, const float*, const float*, const float*, const float*, float*, float*,
                                int64_t, int64_t, Stream);
template void rms_norm_backward(const Bf16*, const Bf16*, const float*, const Bf16*, const Bf16*, Bf16*, float*, int64_t,
                                int64_t, Stream);

}  // namespace caldera::CALDERA_KERNELS
