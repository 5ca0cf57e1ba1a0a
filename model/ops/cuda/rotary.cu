#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {
namespace {

// A block turns all heads of a row.
template <class T, int kN>
__global__ void rotate_kernel(const T* x, int64_t x_stride, const float* cos, const float* sin, float sign,
                              T* y, int64_t y_stride, unsigned heads, unsigned width) {
  const int64_t row = blockIdx.x;
  x += row * x_stride;
  y += row * y_stride;
  cos += row * width;
  sin += row * width;
  const unsigned half = width / 2, packs = half / kN;
  for (unsigned item = threadIdx.x; item < heads * packs; item += kThreads) {
    const unsigned head = item / packs, i = item % packs * kN, low_at = head * width + i,
                   high_at = low_at + half;
    const Floats<kN> low = load<kN>(x + low_at), high = load<kN>(x + high_at);
    const Floats<kN> c = load<kN>(cos + i), s = load<kN>(sin + i);
    Floats<kN> turned_low, turned_high;
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k) {
      turned_low[k] = low[k] * c[k] - high[k] * (sign * s[k]);
      turned_high[k] = high[k] * c[k] + low[k] * (sign * s[k]);
    }
    store(y + low_at, turned_low);
    store(y + high_at, turned_high);
  }
}

}  // namespace

template <class T>
void rotate(const T* x, int64_t x_stride, const float* cos, const float* sin, float sign, T* y, int64_t y_stride,
            int64_t rows, int64_t heads, int64_t width, Stream stream) {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  const bool rows_are_aligned = x_stride * kBytes % 16 == 0 && y_stride * kBytes % 16 == 0;
  with_lanes<T>(
      rows_are_aligned ? width / 2 : 1,
      [&](auto lanes) {
        launch("rotate", rotate_kernel<T, lanes.value>, rows, stream, x, x_stride, cos, sin, sign, y, y_stride,
               static_cast<unsigned>(heads), static_cast<unsigned>(width));
      },
      x, cos, sin, y);
}

template void rotate(const float*, int64_t, const float*, const float*, float, float*, int64_t, int64_t, int64_t,
                     int64_t, Stream);
template void rotate(const Bf16*, int64_t, const float*, const float*, float, Bf16*, int64_t, int64_t, int64_t,
                     int64_t, Stream);

}  // namespace caldera::CALDERA_KERNELS
