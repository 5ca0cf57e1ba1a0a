// What attention's two ways of multiplying on the CPU share (attention_brgemm.h, attention_gemm.h): softmax of
// a block of scores, and memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "model/ops/attention_cpu.h"
#include "model/ops/simd.h"

namespace caldera::attention_parts {

using namespace simd;

// In place: each of `rows` rows of x [block_rows, cols], `pitch` apart, becomes softmax(scale * row) over its
// first first_limit + (row, if causal) elements and zero beyond; the rows that are left of the block are
// zero. y is the rounded copy.
template <class V, class C>
CALDERA_INLINE void softmax_rows(float* x, C* y, int64_t rows, int64_t block_rows, int64_t cols,
                                 int64_t pitch, float scale, bool causal, int64_t first_limit) {
  constexpr float kLow = -std::numeric_limits<float>::infinity();
  constexpr uint32_t kPlaces[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  constexpr int64_t kWidth = kLanesOf<V>;
  BitsOf<V> place;
  std::memcpy(&place, kPlaces, sizeof place);
  for (int64_t r = 0; r < rows; ++r, x += pitch, y += pitch) {
    const int64_t limit = first_limit + (causal ? r : 0), whole = limit / kWidth * kWidth;
    // The last vector's elements beyond the limit do not count.
    if (whole < limit)
      store(x + whole, place < static_cast<uint32_t>(limit - whole) ? load<V>(x + whole) : splat<V>(kLow));
    V best = splat<V>(kLow);
    for (int64_t i = 0; i < limit; i += kWidth) best = simd::max(best, load<V>(x + i));
    const float top = maximum(best);
    V total = {};
    for (int64_t i = 0; i < limit; i += kWidth) {
      const V e = exp(V((load<V>(x + i) - top) * scale));
      total += e;
      store(x + i, e);
    }
    const float factor = 1.0f / sum(total);
    int64_t i = 0;
    for (; i < limit; i += kWidth) {
      const V p = load<V>(x + i) * factor;
      store(x + i, p);
      store(y + i, p);
    }
    for (; i < cols; i += kWidth) {
      store(x + i, V{});
      store(y + i, V{});
    }
  }
  for (int64_t r = rows; r < block_rows; ++r, x += pitch, y += pitch) {
    for (int64_t i = 0; i < cols; i += kWidth) {
      store(x + i, V{});
      store(y + i, V{});
    }
  }
}

// From probabilities p and dp = dL/dp: y = dL/d(q . k) = scale * p * (dp - sum(p * dp)); y may be dp.
template <class V, class C>
CALDERA_INLINE void softmax_backward_rows(const float* p, const float* dp, C* y, int64_t rows, int64_t cols,
                                          int64_t pitch, float scale) {
  for (int64_t r = 0; r < rows; ++r, p += pitch, dp += pitch, y += pitch) {
    V products = {};
    for (int64_t i = 0; i < cols; i += kLanesOf<V>) products += load<V>(p + i) * load<V>(dp + i);
    const float mean = sum(products);
    for (int64_t i = 0; i < cols; i += kLanesOf<V>) {
      const V d = scale * load<V>(p + i) * (load<V>(dp + i) - mean);
      store(y + i, d);
    }
  }
}

// Memory of a thread, kept between tasks.
class Scratch {
 public:
  template <class C>
  C* take(int64_t count) {
    constexpr int64_t kLine = 64;
    const int64_t bytes = (count * static_cast<int64_t>(sizeof(C)) + kLine - 1) / kLine * kLine;
    buffers_.resize(std::max(buffers_.size(), next_ + 1));
    std::vector<Line>& buffer = buffers_[next_++];
    if (std::ssize(buffer) * kLine < bytes) buffer.resize(static_cast<size_t>(bytes / kLine));
    return reinterpret_cast<C*>(buffer.data());
  }
  void reset() { next_ = 0; }

 private:
  struct alignas(64) Line {
    char bytes[64];
  };
  std::vector<std::vector<Line>> buffers_;
  size_t next_ = 0;
};

// Row 0 of one head.
template <class T>
T* head_of(const AttentionRows& x, int64_t head) {
  return static_cast<T*>(x.data) + head * x.head_stride;
}

}  // namespace caldera::attention_parts
