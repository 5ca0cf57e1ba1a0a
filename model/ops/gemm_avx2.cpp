#include "model/ops/gemm_avx2.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/simd_level.h"

#ifdef __x86_64__
#include <immintrin.h>

namespace caldera::gemm {
namespace {

// --- Vectors of 8

CALDERA_AVX2_INLINE __m256 load(const float* x) { return _mm256_loadu_ps(x); }
CALDERA_AVX2_INLINE __m256 load(const c10::BFloat16* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
// The first `count` elements, then zeros.
template <class T>
CALDERA_AVX2_INLINE __m256 load_some(const T* x, int64_t count) {
  if (count >= 8) return load(x);
  alignas(32) T copy[8] = {};
  for (int64_t i = 0; i < count; ++i) copy[i] = x[i];
  return load(copy);
}
CALDERA_AVX2_INLINE void store(float* x, __m256 v) { _mm256_storeu_ps(x, v); }
// Rounded to nearest even; NaN stays NaN.
CALDERA_AVX2_INLINE void store(c10::BFloat16* x, __m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(packed));
}
template <class T>
CALDERA_AVX2_INLINE void store_some(T* x, __m256 v, int64_t count) {
  if (count >= 8) return store(x, v);
  alignas(32) T copy[8];
  store(copy, v);
  for (int64_t i = 0; i < count; ++i) x[i] = copy[i];
}

CALDERA_AVX2_INLINE void transpose(__m256 (&r)[8]) {
  __m256 s[8], t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    t[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    t[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xEE);
    t[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    t[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

// --- Packing

// Tiles of a block are as even as they can be: a tile of one row is slow.
struct Tiles {
  int64_t rows, count = (rows + kTileRows - 1) / kTileRows;
  int64_t begin(int64_t tile) const { return tile * rows / count; }
};

template <class T>
CALDERA_AVX2 void copy_rows(const T* x, int64_t stride, int64_t rows, int64_t depth, float* y) {
  for (int64_t r = 0; r < rows; ++r, x += stride, y += depth) {
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) store(y + k, load(x + k));
    for (; k < depth; ++k) y[k] = static_cast<float>(x[k]);
  }
}

// The last k for which 8 elements from k * stride on are among `size`; -1 if none.
int64_t last_that_fits(int64_t size, int64_t stride) {
  return size < 8 || stride <= 0 ? -1 : (size - 8) / stride;
}

// x [depth, rows] to each tile's [depth, rows of the tile].
template <class T>
CALDERA_AVX2 void copy_tiles(const T* x, int64_t stride, int64_t rows, int64_t depth, float* y) {
  constexpr int64_t kAtOnce = 16;  // of x's rows: their cache lines serve several tiles
  const Tiles tiles{rows};
  for (int64_t begin = 0; begin < depth; begin += kAtOnce) {
    const int64_t end = std::min(depth, begin + kAtOnce);
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t row = tiles.begin(t), count = tiles.begin(t + 1) - row;
      float* to = y + row * depth + begin * count;
      const T* from = x + begin * stride + row;
      // Eight are read and written at once. Those beyond the tile's rows fall on places that are written
      // later, but for the tile's last ones, and are not read beyond the block's end.
      const int64_t safe = std::min(last_that_fits(depth * count, count),
                                    last_that_fits((depth - 1) * stride + rows - row, stride));
      int64_t k = begin;
      for (; k < std::min(end, safe + 1); ++k, to += count, from += stride) store(to, load(from));
      for (; k < end; ++k, to += count, from += stride)
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
    }
  }
}

template <class T>
CALDERA_AVX2 void copy_panels(const T* x, int64_t stride, int64_t depth, int64_t columns, float* y,
                              int64_t panel_stride) {
  constexpr int64_t kAtOnce = 8;
  for (int64_t begin = 0; begin < depth; begin += kAtOnce) {
    const int64_t end = std::min(depth, begin + kAtOnce);
    for (int64_t c = 0; c < columns; c += kPanel) {
      float* to = y + c / kPanel * panel_stride + begin * kPanel;
      const T* from = x + begin * stride + c;
      const int64_t count = columns - c;
      for (int64_t k = begin; k < end; ++k, to += kPanel, from += stride) {
        if (count >= kPanel) {
          store(to, load(from));
          store(to + 8, load(from + 8));
        } else {
          store(to, load_some(from, count));
          store(to + 8, count > 8 ? load_some(from + 8, count - 8) : _mm256_setzero_ps());
        }
      }
    }
  }
}

// x [columns, depth] to the panels of its transpose.
template <class T>
CALDERA_AVX2 void transpose_panels(const T* x, int64_t stride, int64_t depth, int64_t columns, float* y,
                                   int64_t panel_stride) {
  for (int64_t c = 0; c < columns; c += kPanel, y += panel_stride) {
    for (int64_t k = 0; k < depth; k += 16) {
      for (int64_t i = 0; i < kPanel; i += 8) {
        for (int64_t j = k; j < std::min(depth, k + 16); j += 8) {
          const int64_t num_columns = std::clamp<int64_t>(columns - c - i, 0, 8),
                        num_rows = std::min<int64_t>(8, depth - j);
          const T* from = x + (c + i) * stride + j;
          __m256 r[8];
          if (num_columns == 8 && num_rows == 8) {
#pragma GCC unroll 8
            for (int64_t n = 0; n < 8; ++n) r[n] = load(from + n * stride);
          } else {
            for (int64_t n = 0; n < 8; ++n)
              r[n] = n < num_columns ? load_some(from + n * stride, num_rows) : _mm256_setzero_ps();
          }
          transpose(r);
          if (num_rows == 8) {
#pragma GCC unroll 8
            for (int64_t n = 0; n < 8; ++n) store(y + (j + n) * kPanel + i, r[n]);
          } else {
            for (int64_t n = 0; n < num_rows; ++n) store(y + (j + n) * kPanel + i, r[n]);
          }
        }
      }
    }
  }
}

// --- Tiles

// c [kRows, 8 * kVectors] = products, plus bias where given, plus c where `add`. The left factor's elements
// of one row lie together, or those of one depth.
template <int kRows, int kVectors, bool kRowsLieTogether>
CALDERA_AVX2 void multiply_tile(int64_t depth, const float* a, int64_t a_stride, const float* b,
                                int64_t b_stride, float* c, int64_t c_stride, const float* bias, bool add) {
  __m256 sums[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    __builtin_prefetch(c + i * c_stride, 1);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm256_setzero_ps();
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    __m256 y[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) y[v] = load(b + 8 * v);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const __m256 x = _mm256_broadcast_ss(kRowsLieTogether ? a + i * a_stride + k : a + i);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm256_fmadd_ps(x, y[v], sums[i][v]);
    }
    b += b_stride;
    if (!kRowsLieTogether) a += a_stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      __m256 sum = sums[i][v];
      float* to = c + i * c_stride + 8 * v;
      if (bias != nullptr) sum = _mm256_add_ps(sum, load(bias + 8 * v));
      if (add) sum = _mm256_add_ps(sum, load(to));
      store(to, sum);
    }
  }
}
using MultiplyTile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t,
                              const float*, bool);

template <int kVectors, bool kRowsLieTogether>
constexpr MultiplyTile kOfRows[] = {
    nullptr,
    &multiply_tile<1, kVectors, kRowsLieTogether>,
    &multiply_tile<2, kVectors, kRowsLieTogether>,
    &multiply_tile<3, kVectors, kRowsLieTogether>,
    &multiply_tile<4, kVectors, kRowsLieTogether>,
    &multiply_tile<5, kVectors, kRowsLieTogether>,
    &multiply_tile<6, kVectors, kRowsLieTogether>,
};
constexpr const MultiplyTile* kMultiplyTile[2][2] = {{kOfRows<1, false>, kOfRows<1, true>},
                                                     {kOfRows<2, false>, kOfRows<2, true>}};

template <class To, class Added>
CALDERA_AVX2 void put_rows(const float* sums, int64_t rows, int64_t columns, To* to, int64_t stride,
                           const Added* added, int64_t added_stride, const float* bias) {
  for (int64_t r = 0; r < rows; ++r, sums += kPanel, to += stride) {
    for (int64_t c = 0; c < columns; c += 8) {
      __m256 v = load(sums + c);
      if (bias != nullptr) v = _mm256_add_ps(v, load(bias + c));
      if (added != nullptr) v = _mm256_add_ps(v, load_some(added + r * added_stride + c, columns - c));
      store_some(to + c, v, columns - c);
    }
  }
}
// A tile's sums, `kPanel` a row, to their place at (row, column).
void put(const float* sums, int64_t rows, int64_t columns, const Output& out, int64_t row, int64_t column) {
  const float* bias = out.bias == nullptr ? nullptr : out.bias + column;
  const auto with_added = [&]<class Added>(const Added*) {
    const Added* added = static_cast<const Added*>(out.added);
    if (added != nullptr) added += row * out.added_stride + column;
    const int64_t place = row * out.stride + column;
    if (out.is_half)
      put_rows(sums, rows, columns, static_cast<c10::BFloat16*>(out.to) + place, out.stride, added,
               out.added_stride, bias);
    else
      put_rows(sums, rows, columns, static_cast<float*>(out.to) + place, out.stride, added, out.added_stride,
               bias);
  };
  const c10::BFloat16* half = nullptr;
  const float* single = nullptr;
  out.added_is_half ? with_added(half) : with_added(single);
}

// Fetches memory in as many steps as there are tiles.
class Fetcher {
 public:
  Fetcher(const Ahead& ahead, int64_t num_steps) : ahead_(ahead), runs_left_(ahead.num_runs) {
    const int64_t num_lines = ahead.num_runs * ((ahead.run_bytes + kLine - 1) / kLine);
    each_ = (num_lines + num_steps - 1) / std::max<int64_t>(1, num_steps);
  }
  void fetch_some() {
    for (int64_t i = 0; i < each_ && runs_left_ > 0; ++i) {
      __builtin_prefetch(ahead_.data + offset_, 0, 2);
      offset_ += kLine;
      if (offset_ < ahead_.run_bytes) continue;
      offset_ = 0;
      ahead_.data += ahead_.stride_bytes;
      --runs_left_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  Ahead ahead_;
  int64_t runs_left_, each_ = 0, offset_ = 0;
};

}  // namespace

Left packed_left(const Matrix& a, int64_t depth, const float* y) {
  return a.col_stride == 1 ? Left{y, depth, depth, true} : Left{y, depth, 0, false};
}

Left pack_left(const Matrix& a, int64_t rows, int64_t depth, float* y) {
  const auto pack = [&]<class T>(const T* x) {
    a.col_stride == 1 ? copy_rows(x, a.row_stride, rows, depth, y)
                      : copy_tiles(x, a.col_stride, rows, depth, y);
  };
  a.is_half ? pack(static_cast<const c10::BFloat16*>(a.data)) : pack(static_cast<const float*>(a.data));
  return packed_left(a, depth, y);
}

void pack_right(const Matrix& b, int64_t depth, int64_t columns, float* y, int64_t panel_stride) {
  const auto pack = [&]<class T>(const T* x) {
    b.col_stride == 1 ? copy_panels(x, b.row_stride, depth, columns, y, panel_stride)
                      : transpose_panels(x, b.col_stride, depth, columns, y, panel_stride);
  };
  b.is_half ? pack(static_cast<const c10::BFloat16*>(b.data)) : pack(static_cast<const float*>(b.data));
}

void multiply_block(int64_t rows, int64_t columns, int64_t depth, const Left& a, const Right& b,
                    const Output& out, bool by_rows, const Ahead& ahead) {
  const Tiles tiles{rows};
  const int64_t num_panels = (columns + kPanel - 1) / kPanel;
  Fetcher next_block(ahead, tiles.count * num_panels);
  const bool is_plain = !out.is_half && (out.added == nullptr || out.added == out.to);
  const auto multiply = [&](int64_t tile, int64_t panel) {
    next_block.fetch_some();
    const int64_t row = tiles.begin(tile), num_rows = tiles.begin(tile + 1) - row;
    const int64_t column = panel * kPanel, num_columns = std::min(kPanel, columns - column);
    const MultiplyTile function = kMultiplyTile[num_columns > 8][a.rows_lie_together][num_rows];
    const float* left = a.data + row * a.tile_step;
    const int64_t left_stride = a.stride == 0 ? num_rows : a.stride;
    const float* right = b.data + panel * b.panel_stride;
    if (is_plain && num_columns % 8 == 0) {
      function(depth, left, left_stride, right, b.row_stride,
               static_cast<float*>(out.to) + row * out.stride + column, out.stride,
               out.bias == nullptr ? nullptr : out.bias + column, out.added != nullptr);
    } else {
      alignas(64) float sums[kTileRows * kPanel];
      function(depth, left, left_stride, right, b.row_stride, sums, kPanel, nullptr, false);
      put(sums, num_rows, num_columns, out, row, column);
    }
  };
  if (by_rows) {
    for (int64_t t = 0; t < tiles.count; ++t)
      for (int64_t p = 0; p < num_panels; ++p) multiply(t, p);
  } else {
    for (int64_t p = 0; p < num_panels; ++p) {
      const Ahead panel{reinterpret_cast<const char*>(b.data + (p + 1) * b.panel_stride),
                        p + 1 < num_panels ? depth : 0, kPanel * int64_t{sizeof(float)},
                        b.row_stride * int64_t{sizeof(float)}};
      Fetcher next_panel(panel, tiles.count);
      for (int64_t t = 0; t < tiles.count; ++t) {
        next_panel.fetch_some();
        multiply(t, p);
      }
    }
  }
}

}  // namespace caldera::gemm
#else

// No product takes this way there (product_way.h).
namespace caldera::gemm {

Left packed_left(const Matrix&, int64_t, const float*) { assert_failed("AVX2", __FILE__, __LINE__); }
Left pack_left(const Matrix&, int64_t, int64_t, float*) { assert_failed("AVX2", __FILE__, __LINE__); }
void pack_right(const Matrix&, int64_t, int64_t, float*, int64_t) {
  assert_failed("AVX2", __FILE__, __LINE__);
}
void multiply_block(int64_t, int64_t, int64_t, const Left&, const Right&, const Output&, bool, const Ahead&) {
  assert_failed("AVX2", __FILE__, __LINE__);
}

}  // namespace caldera::gemm
#endif
