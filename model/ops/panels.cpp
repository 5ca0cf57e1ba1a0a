#include "model/ops/panels.h"

#include "model/ops/simd.h"

namespace caldera::panels {

using namespace simd;

namespace {

template <class V>
CALDERA_INLINE void widen_rows(const c10::BFloat16* x, int64_t stride, int64_t rows, int64_t cols, float* y) {
  const int64_t width = filled(cols), whole = cols / kLanesOf<V> * kLanesOf<V>;
  for (int64_t r = 0; r < rows; ++r, x += stride, y += width) {
    for (int64_t i = 0; i < whole; i += kLanesOf<V>) store(y + i, load<V>(x + i));
    if (whole < width) std::memset(y + whole, 0, static_cast<size_t>(width - whole) * sizeof *y);
    if (whole < cols) store(y + whole, load<V>(x + whole, cols - whole));
  }
  std::memset(y, 0, static_cast<size_t>((filled(rows) - rows) * width) * sizeof *y);
}

template <class V, class T>
CALDERA_INLINE void store_each(const float* x, int64_t width, int64_t rows, int64_t cols, T* y,
                               int64_t stride) {
  const int64_t whole = cols / kLanesOf<V> * kLanesOf<V>;
  for (int64_t r = 0; r < rows; ++r, x += width, y += stride) {
    for (int64_t i = 0; i < whole; i += kLanesOf<V>) store(y + i, load<V>(x + i));
    if (whole < cols) store(y + whole, load<V>(x + whole, cols - whole), cols - whole);
  }
}

// x [lanes, lanes] of 32 bits each, rows `ld_x` apart, to its transpose.
template <class V>
CALDERA_INLINE void transpose_square(const uint32_t* x, int64_t ld_x, uint32_t* y, int64_t ld_y) {
  constexpr auto kSize = static_cast<uint32_t>(kLanesOf<V>);
  using Bits = BitsOf<V>;
  Bits r[kSize];
  for (uint32_t i = 0; i < kSize; ++i) std::memcpy(&r[i], x + i * ld_x, sizeof r[i]);
  // Blocks off the diagonal change places: the largest first, down to those of 1 by 1.
  const Bits lane = lane_numbers<V>();
#pragma GCC unroll 4
  for (uint32_t s = kSize / 2; s > 0; s /= 2) {
    const Bits upper = (lane & s) == 0u ? lane : lane + kSize - s,
               lower = (lane & s) == 0u ? lane + s : lane + kSize;
#pragma GCC unroll 16
    for (uint32_t i = 0; i < kSize; ++i) {
      if ((i & s) != 0) continue;
      const Bits a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, upper);
      r[i + s] = __builtin_shuffle(a, b, lower);
    }
  }
  for (uint32_t i = 0; i < kSize; ++i) std::memcpy(y + i * ld_y, &r[i], sizeof r[i]);
}
template <class V>
CALDERA_INLINE void transpose_each(const uint32_t* x, int64_t ld_x, int64_t rows, int64_t cols, uint32_t* y,
                                   int64_t ld_y) {
  for (int64_t r = 0; r < rows; r += kLanesOf<V>)
    for (int64_t c = 0; c < cols; c += kLanesOf<V>)
      transpose_square<V>(x + r * ld_x + c, ld_x, y + c * ld_y + r, ld_y);
}

CALDERA_INLINE void copy_into_panels(const float* x, int64_t rows, int64_t cols, float* y) {
  for (int64_t c = 0; c < cols; c += kUnit)
    for (int64_t r = 0; r < rows; ++r, y += kUnit) std::memcpy(y, x + r * cols + c, kUnit * sizeof *x);
}
template <class V>
CALDERA_INLINE void interleave_into_panels(const c10::BFloat16* x, int64_t rows, int64_t cols,
                                           c10::BFloat16* y) {
  for (int64_t c = 0; c < cols; c += kUnit) {
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t i = 0; i < kUnit; i += kLanesOf<V>, y += 2 * kLanesOf<V>) {
        typename TypesOf<V>::HalfBits first, second;
        std::memcpy(&first, x + r * cols + c + i, sizeof first);
        std::memcpy(&second, x + (r + 1) * cols + c + i, sizeof second);
        const BitsOf<V> both =
            __builtin_convertvector(first, BitsOf<V>) | (__builtin_convertvector(second, BitsOf<V>) << 16);
        std::memcpy(y, &both, sizeof both);
      }
    }
  }
}

}  // namespace

void copy_rows(const c10::BFloat16* x, int64_t stride, int64_t rows, int64_t cols, float* y) {
  simd::run<CALDERA_EACH_WIDTH(widen_rows)>(x, stride, rows, cols, y);
}
void store_rows(const float* x, int64_t width, int64_t rows, int64_t cols, float* y, int64_t stride) {
  simd::run<CALDERA_EACH_WIDTH(store_each, float)>(x, width, rows, cols, y, stride);
}
void store_rows(const float* x, int64_t width, int64_t rows, int64_t cols, c10::BFloat16* y, int64_t stride) {
  simd::run<CALDERA_EACH_WIDTH(store_each, c10::BFloat16)>(x, width, rows, cols, y, stride);
}
void transpose_words(const uint32_t* x, int64_t ld_x, int64_t rows, int64_t cols, uint32_t* y, int64_t ld_y) {
  simd::run<CALDERA_EACH_WIDTH(transpose_each)>(x, ld_x, rows, cols, y, ld_y);
}
void make_panels(const float* x, int64_t rows, int64_t cols, float* y) {
  simd::run<copy_into_panels>(x, rows, cols, y);
}
void make_panels(const c10::BFloat16* x, int64_t rows, int64_t cols, c10::BFloat16* y) {
  simd::run<CALDERA_EACH_WIDTH(interleave_into_panels)>(x, rows, cols, y);
}

}  // namespace caldera::panels
