#include "model/ops/panels.h"

#include "model/ops/simd.h"

namespace caldera::panels {

using namespace simd;

CALDERA_SIMD void copy_rows(const c10::BFloat16* x, int64_t stride, int64_t rows, int64_t cols, float* y) {
  const int64_t width = filled(cols), whole = cols / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r, x += stride, y += width) {
    for (int64_t i = 0; i < whole; i += kLanes) store(y + i, load(x + i));
    if (whole < width) std::memset(y + whole, 0, static_cast<size_t>(width - whole) * sizeof *y);
    if (whole < cols) store(y + whole, load(x + whole, cols - whole));
  }
  std::memset(y, 0, static_cast<size_t>((filled(rows) - rows) * width) * sizeof *y);
}

template <class T>
CALDERA_INLINE void store_each(const float* x, int64_t width, int64_t rows, int64_t cols, T* y, int64_t stride) {
  const int64_t whole = cols / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r, x += width, y += stride) {
    for (int64_t i = 0; i < whole; i += kLanes) store(y + i, load(x + i));
    if (whole < cols) store(y + whole, load(x + whole), cols - whole);
  }
}
CALDERA_SIMD void store_rows(const float* x, int64_t width, int64_t rows, int64_t cols, float* y, int64_t stride) {
  store_each(x, width, rows, cols, y, stride);
}
CALDERA_SIMD void store_rows(const float* x, int64_t width, int64_t rows, int64_t cols, c10::BFloat16* y,
                             int64_t stride) {
  store_each(x, width, rows, cols, y, stride);
}

// x [16, 16] of 32 bits each, rows `ld_x` apart, to its transpose.
CALDERA_INLINE void transpose_16(const uint32_t* x, int64_t ld_x, uint32_t* y, int64_t ld_y) {
  Bits r[16];
  for (int64_t i = 0; i < 16; ++i) std::memcpy(&r[i], x + i * ld_x, sizeof r[i]);
  // Blocks off the diagonal change places: of 8 by 8, then 4 by 4, 2 by 2, 1 by 1.
  const Bits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma GCC unroll 4
  for (uint32_t s = 8; s > 0; s /= 2) {
    const Bits upper = (lane & s) == 0u ? lane : lane + 16u - s, lower = (lane & s) == 0u ? lane + s : lane + 16u;
#pragma GCC unroll 16
    for (uint32_t i = 0; i < 16; ++i) {
      if ((i & s) != 0) continue;
      const Bits a = r[i], b = r[i + s];
      r[i] = __builtin_shuffle(a, b, upper);
      r[i + s] = __builtin_shuffle(a, b, lower);
    }
  }
  for (int64_t i = 0; i < 16; ++i) std::memcpy(y + i * ld_y, &r[i], sizeof r[i]);
}
CALDERA_SIMD void transpose_words(const uint32_t* x, int64_t ld_x, int64_t rows, int64_t cols, uint32_t* y,
                                  int64_t ld_y) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < cols; c += 16) transpose_16(x + r * ld_x + c, ld_x, y + c * ld_y + r, ld_y);
}

CALDERA_SIMD void make_panels(const float* x, int64_t rows, int64_t cols, float* y) {
  for (int64_t c = 0; c < cols; c += kUnit)
    for (int64_t r = 0; r < rows; ++r, y += kUnit) std::memcpy(y, x + r * cols + c, kUnit * sizeof *x);
}
CALDERA_SIMD void make_panels(const c10::BFloat16* x, int64_t rows, int64_t cols, c10::BFloat16* y) {
  for (int64_t c = 0; c < cols; c += kUnit) {
    for (int64_t r = 0; r < rows; r += 2) {
      for (int64_t i = 0; i < kUnit; i += kLanes, y += 2 * kLanes) {
        HalfBits first, second;
        std::memcpy(&first, x + r * cols + c + i, sizeof first);
        std::memcpy(&second, x + (r + 1) * cols + c + i, sizeof second);
        const Bits both = __builtin_convertvector(first, Bits) | (__builtin_convertvector(second, Bits) << 16);
        std::memcpy(y, &both, sizeof both);
      }
    }
  }
}

}  // namespace caldera::panels
