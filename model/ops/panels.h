// Factors of small products in the order that oneDNN's inner kernel (LibTorch's brgemm) reads. The left one is dense. The
// right one lies in "panels" of 32 columns each, row after row; for bfloat16 two rows interleaved, so that a 32-bit word
// holds what is multiplied at once. Matrices are filled up with zeros to multiples of 32 rows and columns, so that few
// shapes occur: the inner kernel's code is made for each.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

namespace caldera::panels {

inline constexpr int64_t kUnit = 32;
constexpr int64_t filled(int64_t count) { return (count + kUnit - 1) / kUnit * kUnit; }

// Rows of x [rows, cols], `stride` apart, as dense y [filled(rows), filled(cols)].
void copy_rows(const c10::BFloat16* x, int64_t stride, int64_t rows, int64_t cols, float* y);
template <class T>
void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t cols, T* y) {
  const int64_t width = filled(cols);
  for (int64_t r = 0; r < rows; ++r, x += stride, y += width) {
    std::memcpy(y, x, static_cast<size_t>(cols) * sizeof *y);
    if (cols < width) std::memset(y + cols, 0, static_cast<size_t>(width - cols) * sizeof *y);
  }
  std::memset(y, 0, static_cast<size_t>((filled(rows) - rows) * width) * sizeof *y);
}
// The reverse: of dense x, `width` a row, the first `cols` of each row.
void store_rows(const float* x, int64_t width, int64_t rows, int64_t cols, float* y, int64_t stride);
void store_rows(const float* x, int64_t width, int64_t rows, int64_t cols, c10::BFloat16* y, int64_t stride);

// x [rows, cols] of 32 bits each, both multiples of 16, rows `ld_x` apart, to its transpose.
void transpose_words(const uint32_t* x, int64_t ld_x, int64_t rows, int64_t cols, uint32_t* y, int64_t ld_y);

// Panels of dense x [rows, cols].
void make_panels(const float* x, int64_t rows, int64_t cols, float* y);
void make_panels(const c10::BFloat16* x, int64_t rows, int64_t cols, c10::BFloat16* y);

template <class C>
inline constexpr int64_t kInWord = 4 / sizeof(C);
template <class C>
uint32_t* words(C* x) {
  return reinterpret_cast<uint32_t*>(x);
}
template <class C>
const uint32_t* words(const C* x) {
  return reinterpret_cast<const uint32_t*>(x);
}
// Panels of the transpose of x [rows, cols]: what goes together lies together already.
template <class C>
void make_transposed_panels(const C* x, int64_t rows, int64_t cols, C* y) {
  for (int64_t r = 0; r < rows; r += kUnit, x += kUnit * cols, y += kUnit * cols)
    transpose_words(words(x), cols / kInWord<C>, kUnit, cols / kInWord<C>, words(y), kUnit);
}
// The transpose of what `panels` were made of, [rows, cols], as a left factor: dense [cols, rows].
template <class C>
void transpose_panels(const C* panels, int64_t rows, int64_t cols, C* y) {
  const int64_t num_words = rows / kInWord<C>;
  for (int64_t c = 0; c < cols; c += kUnit, panels += kUnit * rows, y += kUnit * rows)
    transpose_words(words(panels), kUnit, num_words, kUnit, words(y), num_words);
}

}  // namespace caldera::panels
