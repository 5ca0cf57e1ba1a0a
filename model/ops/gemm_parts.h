// How gemm.cpp cuts a product, and the memory that it keeps. What a thread packs at once is bounded whatever
// the sizes: columns are cut into slabs, and a deep product into slices of its depth, added up one after
// another.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "model/ops/gemm_avx2.h"

namespace caldera::gemm {

// A panel of the right factor and a tile's rows of the left one stay in 32 KiB of cache together.
inline constexpr int64_t kMostDepth = 320;
// So much of the left factor, this deep, stays in half of 256 KiB or more.
inline constexpr int64_t kMostRows = 120;
// Floats of the right factor that are packed at once, for all threads together; and for one that has few rows
// to multiply.
inline constexpr int64_t kSlab = 1 << 21, kSmallSlab = 1 << 16;
inline constexpr int64_t kLeastSlabColumns = 256, kMostSlabColumns = 4096;
// Blocks of the depth for which factors are packed at once: a deeper product takes several slices. At most
// 4160 deep, so that no depth up to 4096 is cut.
inline constexpr int64_t kSliceBlocks = 13, kMostSlice = kSliceBlocks * kMostDepth;
// Floats of a bfloat16 result's sums that all threads share between slices.
inline constexpr int64_t kSharedSums = 1 << 20;

// The most floats that a thread keeps, of both factors and of sums, and those that serve all of them.
inline constexpr int64_t kMostOfThread = kMostSlice * (kMostRows + kPanel) + kMostRows * kMostSlabColumns;
inline constexpr int64_t kMostShared = kSlab + kSharedSums;
static_assert(kSmallSlab <= kMostSlice * kPanel && kLeastSlabColumns * kMostSlice <= kSlab);

inline int64_t divided_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t rounded_up(int64_t x, int64_t unit) { return divided_up(x, unit) * unit; }

// `total` in parts of `each`, but for the last.
struct Parts {
  int64_t total, each;
  int64_t count() const { return std::max<int64_t>(1, divided_up(total, each)); }
  int64_t begin(int64_t part) const { return std::min(total, part * each); }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
};
// In parts of `most` at most, a multiple of `unit`, as even as such multiples can be.
inline Parts parts_of(int64_t total, int64_t most, int64_t unit) {
  const int64_t count = std::max<int64_t>(1, divided_up(total, most));
  return {total, std::max(unit, rounded_up(divided_up(total, count), unit))};
}
inline Parts depth_parts(int64_t depth) { return parts_of(depth, kMostDepth, 8); }

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
  int64_t size() const { return size_; }

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

// to [M, N] = a [M, K] times b [K, N], plus bias [N] and `added` [M, N] where given.
struct Product {
  int64_t M, N;
  Parts depths;
  Matrix a, b, to, added;
  const float* bias = nullptr;
  // [M, N]: where keeps_sums(), the sums between slices.
  float* sums = nullptr;

  Parts slices() const { return parts_of(depths.count(), kSliceBlocks, 1); }
  int64_t slice_depth() const { return std::min(depths.total, slices().each * depths.each); }
  bool keeps_sums() const { return to.is_half && slices().count() > 1; }

  Product part(int64_t row, int64_t rows, int64_t column, int64_t columns) const {
    Product y = *this;
    y.M = rows;
    y.N = columns;
    y.a = a.at(row, 0);
    y.b = b.at(0, column);
    y.to = to.at(row, column);
    if (added.data != nullptr) y.added = added.at(row, column);
    if (bias != nullptr) y.bias += column;
    return y;
  }
  // f(slice) for one slice of the depth after another. They end where blocks of the depth do: the sums, and
  // so their bits, are those of the depth in one.
  template <class Function>
  void by_slices(Function f) const {
    const Parts parts = slices();
    const Matrix total = to.is_half ? Matrix{sums, false, N, 1} : to;
    Product slice = *this;
    for (int64_t i = 0; i < parts.count(); ++i) {
      const int64_t begin = depths.begin(parts.begin(i)), end = depths.begin(parts.begin(i + 1));
      slice.depths = {end - begin, depths.each};
      slice.a = a.at(0, begin);
      slice.b = b.at(begin, 0);
      slice.to = i + 1 < parts.count() ? total : to;
      f(slice);
      slice.added = total;
      slice.bias = nullptr;
    }
  }
};

}  // namespace caldera::gemm
