#include "model/ops/gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>

#include "base/error.h"
#include "model/ops/gemm_parts.h"

namespace caldera::gemm {
namespace {

// Columns of the result up to which float32 rows are read where they are.
constexpr int64_t kReadInPlace = 192;
// Floats of a block of the right factor that is read again for each row of tiles.
constexpr int64_t kByRows = 1 << 15;
// Multiplications that are worth a second thread.
constexpr int64_t kGrain = 1 << 19;

GemmScratch& scratch() {
  thread_local GemmScratch instance;
  return instance;
}

// Both factors are packed by blocks of the depth, one after another; within one, tiles or panels follow each
// other. (Panels of the whole depth would lie powers of two apart, and the same few lines of the caches would
// hold all of them.)
struct Packed {
  const float* data;
  int64_t width;  // rows, or columns filled up to panels
  Left left(const Matrix& of, int64_t begin, int64_t depth) const {
    return packed_left(of, depth, data + begin * width);
  }
  Right right(int64_t begin, int64_t depth, int64_t panel) const {
    return Right{data + begin * width, kPanel, depth * kPanel}.at(0, panel);
  }
};
Packed pack_all_left(const Product& p, float* y) {
  for (int64_t d = 0; d < p.depths.count(); ++d)
    pack_left(p.a.at(0, p.depths.begin(d)), p.M, p.depths.size(d), y + p.depths.begin(d) * p.M);
  return {y, p.M};
}
// The panels of some of b's columns, into y of `width` columns.
void pack_all_right(const Product& p, int64_t column, int64_t columns, float* y, int64_t width,
                    int64_t panel) {
  for (int64_t d = 0; d < p.depths.count(); ++d) {
    const int64_t begin = p.depths.begin(d), depth = p.depths.size(d);
    pack_right(p.b.at(begin, column), depth, columns, y + begin * width + panel * depth * kPanel,
               depth * kPanel);
  }
}
// All of b's panels.
Packed pack_on_threads(const Product& p, float* y, int64_t threads) {
  const Parts parts = parts_of(p.N, divided_up(p.N, threads), kPanel);
  const int64_t width = rounded_up(p.N, kPanel);
  at::parallel_for(0, parts.count(), 1, [&](int64_t first, int64_t last) {
    const int64_t begin = parts.begin(first);
    pack_all_right(p, begin, parts.begin(last) - begin, y, width, begin / kPanel);
  });
  return {y, width};
}

// Whether tiles read this factor where it is.
bool reads_in_place(const Matrix& a, int64_t columns) {
  return !a.is_half && a.col_stride == 1 && a.row_stride > 0 && columns <= kReadInPlace;
}

Ahead ahead_of(const Matrix& a, int64_t rows, int64_t depth) {
  const int64_t bytes = a.is_half ? 2 : 4;
  const char* data = static_cast<const char*>(a.data);
  return a.col_stride == 1 ? Ahead{data, rows, depth * bytes, a.row_stride * bytes}
                           : Ahead{data, rows > 0 ? depth : 0, rows * bytes, a.col_stride * bytes};
}

// Rows of the result from `row` on and columns from `column` on, by panels of those columns from `panel` on.
// The rows of a may be packed.
void multiply_rows(const Product& p, int64_t row, int64_t rows, int64_t column, int64_t columns,
                   const Packed& b, int64_t panel, const Packed* packed_a = nullptr) {
  const Parts& depths = p.depths;
  const bool in_place = packed_a == nullptr && reads_in_place(p.a, columns);
  const Matrix c = p.to.at(row, column);
  Matrix total = c;
  if (c.is_half && depths.count() > 1)
    total = p.sums != nullptr ? Matrix{p.sums + row * p.N + column, false, p.N, 1}
                              : Matrix{scratch().sums.take(rows * columns), false, columns, 1};
  for (int64_t d = 0; d < depths.count(); ++d) {
    const int64_t begin = depths.begin(d), depth = depths.size(d);
    const bool is_first = d == 0, is_last = d + 1 == depths.count();
    const Matrix block = p.a.at(row, begin);
    const Left left =
        packed_a != nullptr ? packed_a->left(block, begin, depth)
        : in_place ? Left{static_cast<const float*>(block.data), block.row_stride, block.row_stride, true}
                   : pack_left(block, rows, depth, scratch().left.take(rows * depth));
    const Matrix to = is_last ? c : total;
    const Matrix added = !is_first ? total : p.added.data != nullptr ? p.added.at(row, column) : Matrix{};
    const Output out{const_cast<void*>(to.data),
                     to.is_half,
                     to.row_stride,
                     added.data,
                     added.is_half,
                     added.row_stride,
                     is_first && p.bias ? p.bias + column : nullptr};
    Ahead ahead;
    if (packed_a == nullptr && !in_place) {
      // The next block to pack: these rows further on, or the rows below.
      ahead = is_last ? ahead_of(p.a.at(row + rows, 0), std::min(rows, p.M - row - rows), depth)
                      : ahead_of(p.a.at(row, begin + depth), rows, depths.size(d + 1));
    }
    multiply_block(rows, columns, depth, left, b.right(begin, depth, panel), out, depth * columns <= kByRows,
                   ahead);
  }
}

// Threads as a grid over rows and columns: each packs its rows once.
struct Grid {
  int64_t by_rows = 1, by_columns = 1;
};
Grid best_grid(int64_t threads, int64_t M, int64_t N) {
  Grid best;
  int64_t best_cost = INT64_MAX;
  for (int64_t by_rows = 1; by_rows <= threads; ++by_rows) {
    const int64_t by_columns = threads / by_rows;
    const int64_t rows = rounded_up(divided_up(M, by_rows), kTileRows);
    const int64_t columns = rounded_up(divided_up(N, by_columns), kPanel);
    // To pack an element takes as long as some 8 multiplications.
    const int64_t cost = rows * (columns + 8);
    if (cost < best_cost) {
      best_cost = cost;
      best = {by_rows, by_columns};
    }
  }
  return best;
}

void multiply_slab(const Product& p, int64_t threads, const Packed& b) {
  const Grid grid = best_grid(threads, p.M, p.N);
  const Parts by_rows = parts_of(p.M, divided_up(p.M, grid.by_rows), kTileRows),
              by_columns = parts_of(p.N, divided_up(p.N, grid.by_columns), kPanel);
  const int64_t jobs = by_rows.count() * by_columns.count();
  at::parallel_for(0, jobs, 1, [&](int64_t first, int64_t last) {
    for (int64_t job = first; job < last; ++job) {
      const int64_t r = job / by_columns.count(), c = job % by_columns.count();
      const Parts blocks = parts_of(by_rows.size(r), kMostRows, kTileRows);
      for (int64_t i = 0; i < blocks.count(); ++i)
        multiply_rows(p, by_rows.begin(r) + blocks.begin(i), blocks.size(i), by_columns.begin(c),
                      by_columns.size(c), b, by_columns.begin(c) / kPanel);
    }
  });
}

// Columns of a slab of so many floats.
int64_t slab_columns(int64_t floats, const Product& p) {
  return std::max(kPanel, floats / std::max<int64_t>(1, p.slice_depth()) / kPanel * kPanel);
}

// On all threads, which share the right factor's panels.
void multiply_many_rows(const Product& p, int64_t threads) {
  const int64_t most_columns = std::clamp(slab_columns(kSlab, p), kLeastSlabColumns, kMostSlabColumns);
  const int64_t most_rows = p.keeps_sums() ? kSharedSums / most_columns / kTileRows * kTileRows : p.M;
  const Parts by_rows = parts_of(p.M, most_rows, kTileRows), by_columns = parts_of(p.N, most_columns, kPanel);
  for (int64_t r = 0; r < by_rows.count(); ++r) {
    for (int64_t c = 0; c < by_columns.count(); ++c) {
      Product part = p.part(by_rows.begin(r), by_rows.size(r), by_columns.begin(c), by_columns.size(c));
      if (p.keeps_sums()) part.sums = scratch().sums.take(part.M * part.N);
      part.by_slices([&](const Product& slice) {
        float* panels = scratch().right.take(slice.depths.total * rounded_up(slice.N, kPanel));
        multiply_slab(slice, threads, pack_on_threads(slice, panels, threads));
      });
    }
  }
}

// At most kMostRows on the calling thread.
void multiply_few_rows(const Product& p) {
  const Parts by_columns = parts_of(p.N, p.keeps_sums() ? kMostSlabColumns : p.N, kPanel);
  for (int64_t c = 0; c < by_columns.count(); ++c) {
    Product part = p.part(0, p.M, by_columns.begin(c), by_columns.size(c));
    if (p.keeps_sums()) part.sums = scratch().sums.take(part.M * part.N);
    part.by_slices([&](const Product& slice) {
      std::optional<Packed> left;
      if (!reads_in_place(slice.a, slice.N))
        left = pack_all_left(slice, scratch().left.take(slice.M * slice.depths.total));
      const Parts slabs = parts_of(slice.N, slab_columns(kSmallSlab, slice), kPanel);
      for (int64_t s = 0; s < slabs.count(); ++s) {
        const int64_t column = slabs.begin(s), columns = slabs.size(s), width = rounded_up(columns, kPanel);
        float* panels = scratch().right.take(slice.depths.total * width);
        pack_all_right(slice, column, columns, panels, width, 0);
        multiply_rows(slice, 0, slice.M, column, columns, {panels, width}, 0, left ? &*left : nullptr);
      }
    });
  }
}

int64_t threads_for(int64_t num_multiplications) {
  return at::in_parallel_region()
             ? 1
             : std::clamp<int64_t>(num_multiplications / kGrain, 1, at::get_num_threads());
}

// Sides of length 1 lie together.
Matrix normalised(Matrix x, int64_t rows, int64_t cols) {
  if (cols == 1) x.col_stride = 1;
  if (rows == 1 && x.col_stride != 1) x.row_stride = 1;
  CALDERA_ASSERT(x.row_stride == 1 || x.col_stride == 1 || rows == 0 || cols == 0);
  return x;
}

// c = a [M, K] times b [K, N], plus bias [N] where it has data, plus c with `accumulate`. Of each factor one
// stride is 1, but for sides of length 1.
void multiply(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b, const Matrix& c,
              bool accumulate = false, const Matrix& bias = {}) {
  if (M == 0 || N == 0) return;
  Product p{M, N, depth_parts(K), normalised(a, M, K), normalised(b, K, N), c, accumulate ? c : Matrix{}};
  if (bias.data != nullptr) {
    float* copy = scratch().bias.take(rounded_up(N, kPanel));
    pack_right(bias, 1, N, copy, kPanel);
    p.bias = copy;
  }
  const int64_t threads = threads_for(M * N * std::max<int64_t>(1, K));
  // A thread among others keeps no slab of its own.
  if (M > kMostRows && !at::in_parallel_region()) return multiply_many_rows(p, threads);
  // Every thread packs the columns that it multiplies.
  const Parts by_rows = parts_of(M, kMostRows, kTileRows),
              by_columns = parts_of(N, divided_up(N, threads), kPanel);
  at::parallel_for(0, by_columns.count(), 1, [&](int64_t first, int64_t last) {
    const int64_t begin = by_columns.begin(first), count = by_columns.begin(last) - begin;
    for (int64_t r = 0; r < by_rows.count(); ++r)
      multiply_few_rows(p.part(by_rows.begin(r), by_rows.size(r), begin, count));
  });
}

// As factors are read: one of the last two strides is 1.
at::Tensor ready(const at::Tensor& x) {
  const auto lies = [&](int64_t dim) { return x.stride(dim) == 1 || x.size(dim) == 1; };
  return lies(-1) || lies(-2) ? x : x.contiguous();
}
// The i-th matrix of a batch, or x itself.
Matrix matrix_of(const at::Tensor& x, int64_t i = 0) {
  const char* data =
      static_cast<const char*>(x.const_data_ptr()) + (i == 0 ? 0 : i * x.stride(0) * x.element_size());
  return {data, x.scalar_type() == at::kBFloat16, x.stride(-2), x.stride(-1)};
}
// The same of a dense x. (Strides of sides of length 1 can be any.)
Matrix result_of(const at::Tensor& x, int64_t i = 0) {
  const Matrix m = matrix_of(x, i);
  return {m.data, m.is_half, x.size(-1), 1};
}
Matrix bias_of(const at::Tensor& bias, int64_t N) {
  if (!bias.defined()) return {};
  CALDERA_ASSERT(bias.dim() == 1 && bias.size(0) == N && (bias.stride(0) == 1 || N == 1));
  return {bias.const_data_ptr(), bias.scalar_type() == at::kBFloat16, N, 1};
}

}  // namespace

void multiply_ready(int64_t M, int64_t N, int64_t K, const Left& a, const Right& b, float* c,
                    int64_t c_stride, bool accumulate) {
  const Parts depths = depth_parts(K);
  for (int64_t d = 0; d < depths.count(); ++d) {
    const int64_t begin = depths.begin(d), depth = depths.size(d);
    Left left = a;
    left.data += a.rows_lie_together ? begin : begin * a.stride;
    const Output out{c, false, c_stride, accumulate || d > 0 ? c : nullptr, false, c_stride, nullptr};
    multiply_block(M, N, depth, left, b.at(begin, 0), out, depth * N <= kByRows);
  }
}

void product_into(const at::Tensor& a_in, const at::Tensor& b_in, const at::Tensor& out, bool accumulate,
                  const at::Tensor& bias) {
  CALDERA_ASSERT(a_in.dim() == out.dim() && b_in.dim() == out.dim() && out.is_contiguous());
  const int64_t M = out.size(-2), N = out.size(-1), K = a_in.size(-1);
  CALDERA_ASSERT(a_in.size(-2) == M && b_in.size(-2) == K && b_in.size(-1) == N);
  const at::Tensor a = ready(a_in), b = ready(b_in);
  if (out.dim() == 2)
    return multiply(M, N, K, matrix_of(a), matrix_of(b), result_of(out), accumulate, bias_of(bias, N));
  CALDERA_ASSERT(out.dim() == 3 && a.size(0) == out.size(0) && b.size(0) == out.size(0) && !bias.defined());
  const int64_t num_products = out.size(0);
  const auto multiply_some = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      multiply(M, N, K, matrix_of(a, i), matrix_of(b, i), result_of(out, i), accumulate);
  };
  // Each on all threads, or, where they are many, some on each thread.
  if (num_products < 2 * threads_for(num_products * M * N * K)) return multiply_some(0, num_products);
  at::parallel_for(0, num_products, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, M * N * K)),
                   multiply_some);
}

int64_t kept_bytes() {
  const GemmScratch& x = scratch();
  return (x.left.size() + x.right.size() + x.sums.size() + x.bias.size()) * int64_t{sizeof(float)};
}

int64_t most_kept_bytes(int64_t num_threads) {
  return (num_threads * kMostOfThread + kMostShared) * int64_t{sizeof(float)};
}

}  // namespace caldera::gemm
