// The inner parts of gemm.h for processors with AVX2 and FMA: packing, and products of tiles that stay in
// registers. Legend: rows are the left factor's and the result's, columns the right factor's and the
// result's, depth is what both factors have.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>

namespace caldera::gemm {

inline constexpr int64_t kTileRows = 6;  // with 16 columns, 12 of AVX2's 16 registers hold sums
inline constexpr int64_t kPanel = 16;    // columns of a panel of the right factor

// A matrix of float32 or bfloat16, its strides in elements.
struct Matrix {
  const void* data = nullptr;
  bool is_half = false;  // bfloat16
  int64_t row_stride = 0, col_stride = 0;

  Matrix at(int64_t row, int64_t col) const {
    const int64_t bytes = (row * row_stride + col * col_stride) * (is_half ? 2 : 4);
    return {static_cast<const char*>(data) + bytes, is_half, row_stride, col_stride};
  }
};

// The left factor as tiles read it. A tile that begins at row t does so at data + t * tile_step. Either its
// rows lie together, `stride` apart, or what belongs to one depth does, `stride` apart: 0 stands for the
// number of the tile's rows.
struct Left {
  const float* data = nullptr;
  int64_t tile_step = 0, stride = 0;
  bool rows_lie_together = true;
};
// The right factor: `kPanel` columns at a time, panels panel_stride and rows row_stride apart. All of a
// panel's columns can be read, also beyond the last that counts.
struct Right {
  const float* data = nullptr;
  int64_t row_stride = kPanel, panel_stride = 0;

  Right at(int64_t row, int64_t panel) const {
    return {data + row * row_stride + panel * panel_stride, row_stride, panel_stride};
  }
};
// Where sums go: to = sums + bias + added, each of the latter two where given.
struct Output {
  void* to = nullptr;
  bool is_half = false;
  int64_t stride = 0;
  const void* added = nullptr;
  bool added_is_half = false;
  int64_t added_stride = 0;
  const float* bias = nullptr;
};

// The left factor's block a [rows, depth] for tiles, in y [rows * depth].
Left packed_left(const Matrix& a, int64_t depth, const float* y);
Left pack_left(const Matrix& a, int64_t rows, int64_t depth, float* y);
// Panels of b [depth, columns], zeros beyond its last column, panel_stride apart.
void pack_right(const Matrix& b, int64_t depth, int64_t columns, float* y, int64_t panel_stride);

// Memory that is read next, `num_runs` runs of so many bytes: fetched into the cache while a block is
// multiplied.
struct Ahead {
  const char* data = nullptr;
  int64_t num_runs = 0, run_bytes = 0, stride_bytes = 0;
};

// The product of a block: tiles of each panel one after another, or, `by_rows`, panels of each row of tiles.
void multiply_block(int64_t rows, int64_t columns, int64_t depth, const Left& a, const Right& b,
                    const Output& out, bool by_rows, const Ahead& ahead = {});

}  // namespace caldera::gemm
