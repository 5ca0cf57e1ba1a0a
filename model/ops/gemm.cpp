#include "model/ops/gemm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>

#include "base/cpu.h"
#include "base/error.h"

namespace caldera::gemm {
namespace {

// A panel of the right factor and a tile's rows of the left one stay in 32 KiB of cache together.
constexpr int64_t kMostDepth = 320;
// So much of the left factor, this deep, stays in half of 256 KiB or more.
constexpr int64_t kMostRows = 120;
// Floats of the right factor that are packed at once, for all threads together; and for one that has few rows
// to multiply.
constexpr int64_t kSlab = 1 << 21, kSmallSlab = 1 << 16;
constexpr int64_t kLeastSlabColumns = 256;
// Columns of the result up to which float32 rows are read where they are.
constexpr int64_t kReadInPlace = 192;
// Floats of a block of the right factor that is read again for each row of tiles.
constexpr int64_t kByRows = 1 << 15;
// Multiplications that are worth a second thread.
constexpr int64_t kGrain = 1 << 19;

int64_t divided_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
int64_t rounded_up(int64_t x, int64_t unit) { return divided_up(x, unit) * unit; }

// `total` in parts of `most` at most, as even as multiples of `unit` can be.
struct Parts {
  Parts(int64_t total_in, int64_t most, int64_t unit)
      : total(total_in),
        each(std::max(unit,
                      rounded_up(divided_up(total, std::max<int64_t>(1, divided_up(total, most))), unit))) {}
  int64_t count() const { return std::max<int64_t>(1, divided_up(total, each)); }
  int64_t begin(int64_t part) const { return std::min(total, part * each); }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
  int64_t total, each;
};
Parts depth_parts(int64_t depth) { return Parts(depth, kMostDepth, 8); }

// Floats at a multiple of 64 bytes, not initialised.
class Buffer {
 public:
  // What was there is lost where it has to grow.
  float* take(int64_t count) {
    if (count > size_) {
      data_.reset();
      data_.reset(
          static_cast<float*>(::operator new[](static_cast<size_t>(count) * sizeof(float), kAlignment)));
      size_ = count;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* x) const { ::operator delete[](x, kAlignment); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

// Memory of a thread, kept between products: what is freed in between comes back page by page.
struct GemmScratch {
  Buffer left, right, sums, bias;
};
GemmScratch& scratch() {
  thread_local GemmScratch instance;
  return instance;
}

struct Product {
  int64_t M, N, K;
  Matrix a;
  Result c;
  bool accumulate;
  const float* bias;
};

Matrix as_matrix(const Result& c) { return {c.data, c.is_half, c.row_stride, 1}; }

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
Packed pack_all_left(const Matrix& a, int64_t rows, int64_t K, float* y) {
  const Parts depths = depth_parts(K);
  for (int64_t d = 0; d < depths.count(); ++d)
    pack_left(a.at(0, depths.begin(d)), rows, depths.size(d), y + depths.begin(d) * rows);
  return {y, rows};
}
// The panels of some of b's columns, into y of `width` columns, at `panel` there.
void pack_all_right(const Matrix& b, int64_t K, int64_t columns, float* y, int64_t width, int64_t panel) {
  const Parts depths = depth_parts(K);
  for (int64_t d = 0; d < depths.count(); ++d) {
    const int64_t begin = depths.begin(d), depth = depths.size(d);
    pack_right(b.at(begin, 0), depth, columns, y + begin * width + panel * depth * kPanel, depth * kPanel);
  }
}

// All of b's panels.
void pack_on_threads(const Matrix& b, int64_t K, int64_t columns, float* y, int64_t threads) {
  const Parts parts(columns, divided_up(columns, threads), kPanel);
  at::parallel_for(0, parts.count(), 1, [&](int64_t first, int64_t last) {
    const int64_t begin = parts.begin(first);
    pack_all_right(b.at(0, begin), K, parts.begin(last) - begin, y, rounded_up(columns, kPanel),
                   begin / kPanel);
  });
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
  const Parts depths = depth_parts(p.K);
  const bool in_place = packed_a == nullptr && reads_in_place(p.a, columns);
  const bool has_sums = p.c.is_half && depths.count() > 1;
  const Matrix c = as_matrix(p.c).at(row, column);
  float* sums = has_sums ? scratch().sums.take(rows * columns) : nullptr;
  for (int64_t d = 0; d < depths.count(); ++d) {
    const int64_t begin = depths.begin(d), depth = depths.size(d);
    const bool is_first = d == 0, is_last = d + 1 == depths.count();
    const Matrix block = p.a.at(row, begin);
    const Left left =
        packed_a != nullptr ? packed_a->left(block, begin, depth)
        : in_place ? Left{static_cast<const float*>(block.data), block.row_stride, block.row_stride, true}
                   : pack_left(block, rows, depth, scratch().left.take(rows * depth));
    const Matrix total = has_sums ? Matrix{sums, false, columns, 1} : c;
    const Matrix to = is_last ? c : total, added = !is_first ? total : p.accumulate ? c : Matrix{};
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

// Columns [column, column + columns) by their panels.
void multiply_slab(const Product& p, int64_t threads, int64_t column, int64_t columns, const Packed& b) {
  const Grid grid = best_grid(threads, p.M, columns);
  const Parts by_rows(p.M, divided_up(p.M, grid.by_rows), kTileRows),
      by_columns(columns, divided_up(columns, grid.by_columns), kPanel);
  const int64_t jobs = by_rows.count() * by_columns.count();
  at::parallel_for(0, jobs, 1, [&](int64_t first, int64_t last) {
    for (int64_t job = first; job < last; ++job) {
      const int64_t r = job / by_columns.count(), c = job % by_columns.count();
      const Parts blocks(by_rows.size(r), kMostRows, kTileRows);
      for (int64_t i = 0; i < blocks.count(); ++i)
        multiply_rows(p, by_rows.begin(r) + blocks.begin(i), blocks.size(i), column + by_columns.begin(c),
                      by_columns.size(c), b, by_columns.begin(c) / kPanel);
    }
  });
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

Product product_of(int64_t M, int64_t N, int64_t K, const Matrix& a, const Result& c, bool accumulate,
                   const Matrix& bias) {
  Product p{M, N, K, normalised(a, M, K), c, accumulate, nullptr};
  if (bias.data != nullptr) {
    float* copy = scratch().bias.take(rounded_up(N, kPanel));
    pack_right(Matrix{bias.data, bias.is_half, N, 1}, 1, N, copy, kPanel);
    p.bias = copy;
  }
  return p;
}

}  // namespace

bool is_there() { return cpu().avx2; }

void pack(int64_t N, int64_t K, const Matrix& b, float* panels) {
  pack_on_threads(normalised(b, K, N), K, N, panels, threads_for(K * N * 16));
}

void multiply(int64_t M, int64_t N, int64_t K, const Matrix& a, const Matrix& b_in, const Result& c,
              bool accumulate, const Matrix& bias) {
  if (M == 0 || N == 0) return;
  const Product p = product_of(M, N, K, a, c, accumulate, bias);
  const Matrix b = normalised(b_in, K, N);
  const int64_t threads = threads_for(M * N * std::max<int64_t>(1, K));
  const auto columns_of = [&](int64_t slab) {
    return std::max(kPanel, slab / std::max<int64_t>(1, K) / kPanel * kPanel);
  };
  if (M <= kMostRows) {
    // Every thread packs the columns that it multiplies.
    const Parts by_columns(N, divided_up(N, threads), kPanel);
    at::parallel_for(0, by_columns.count(), 1, [&](int64_t first, int64_t last) {
      const int64_t begin = by_columns.begin(first), count = by_columns.begin(last) - begin;
      std::optional<Packed> left;
      if (!reads_in_place(p.a, count)) left = pack_all_left(p.a, M, K, scratch().left.take(M * K));
      const Parts slabs(count, columns_of(kSmallSlab), kPanel);
      for (int64_t s = 0; s < slabs.count(); ++s) {
        const int64_t column = begin + slabs.begin(s), columns = slabs.size(s),
                      width = rounded_up(columns, kPanel);
        float* panels = scratch().right.take(K * width);
        pack_all_right(b.at(0, column), K, columns, panels, width, 0);
        multiply_rows(p, 0, M, column, columns, {panels, width}, 0, left ? &*left : nullptr);
      }
    });
    return;
  }
  const Parts slabs(N, std::max(kLeastSlabColumns, columns_of(kSlab)), kPanel);
  for (int64_t s = 0; s < slabs.count(); ++s) {
    const int64_t column = slabs.begin(s), columns = slabs.size(s), width = rounded_up(columns, kPanel);
    float* panels = scratch().right.take(K * width);
    pack_on_threads(b.at(0, column), K, columns, panels, threads);
    multiply_slab(p, threads, column, columns, {panels, width});
  }
}

void multiply_by_packed(int64_t M, int64_t N, int64_t K, const Matrix& a, const float* panels,
                        const Result& c, bool accumulate, const Matrix& bias) {
  if (M == 0 || N == 0) return;
  const Product p = product_of(M, N, K, a, c, accumulate, bias);
  multiply_slab(p, threads_for(M * N * std::max<int64_t>(1, K)), 0, N, {panels, rounded_up(N, kPanel)});
}

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

namespace {

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
Result result_of(const at::Tensor& x, int64_t i = 0) {
  const Matrix m = matrix_of(x, i);
  return {const_cast<void*>(m.data), m.is_half, x.size(-1)};
}
Matrix bias_of(const at::Tensor& bias, int64_t N) {
  if (!bias.defined()) return {};
  CALDERA_ASSERT(bias.dim() == 1 && bias.size(0) == N && (bias.stride(0) == 1 || N == 1));
  return {bias.const_data_ptr(), bias.scalar_type() == at::kBFloat16, N, 1};
}

}  // namespace

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

at::Tensor packed(const at::Tensor& b_in) {
  const at::Tensor b = ready(b_in);
  at::Tensor panels = at::empty({packed_size(b.size(0), b.size(1))}, b.options().dtype(at::kFloat));
  pack(b.size(1), b.size(0), matrix_of(b), panels.data_ptr<float>());
  return panels;
}

void product_by_packed_into(const at::Tensor& a_in, const at::Tensor& panels, const at::Tensor& out,
                            const at::Tensor& bias) {
  const int64_t M = out.size(0), N = out.size(1), K = a_in.size(1);
  CALDERA_ASSERT(a_in.size(0) == M && panels.numel() == packed_size(K, N) && out.is_contiguous());
  const at::Tensor a = ready(a_in);
  multiply_by_packed(M, N, K, matrix_of(a), panels.const_data_ptr<float>(), result_of(out), false,
                     bias_of(bias, N));
}

}  // namespace caldera::gemm
