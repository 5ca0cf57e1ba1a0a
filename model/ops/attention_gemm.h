// One key head of attention by our own matrix product (gemm.h). Factors are read where they lie as far as
// that goes; the others are packed once for all blocks of queries.
#pragma once
#include <algorithm>
#include <cmath>

#include "model/ops/attention_parts.h"
#include "model/ops/gemm.h"
#include "model/ops/panels.h"

namespace caldera {

// T is what tensors hold; products are in float32. Legend: K head width, N query rows and L key rows of one
// sample.
template <class T>
class GemmKeyHead {
 public:
  static constexpr bool kUsesOneDnn = false;

  GemmKeyHead(const AttentionSample& sample, int64_t head, bool causal, attention_parts::Scratch& scratch)
      : sample_(sample),
        head_(head),
        causal_(causal),
        scratch_(scratch),
        N_(sample.q.count),
        L_(sample.k.count),
        K_(sample.q.width),
        pitch_(odd_pitch(L_)),
        scale_(1.0f / std::sqrt(static_cast<float>(K_))) {
    scratch_.reset();
    k_transposed_ = transposed_panels(sample.k);
    q_ = take(kQueries * K_ + gemm::kPanel);
    p_ = take(kQueries * pitch_);
    narrow_ = take(kQueries * K_ + gemm::kPanel);
  }

  void forward(const AttentionRows& out) {
    const gemm::Right v = panels(sample_.v);
    for_each_block([&](const Block& b) {
      probabilities(b);
      gemm::multiply_ready(b.count, K_, b.keys, rows(p_, pitch_), v, narrow_, K_);
      store_block(out, b);
    });
  }

  void backward(const AttentionGradients& gradients) {
    const gemm::Right k = panels(sample_.k), v_transposed = transposed_panels(sample_.v);
    float *d_out = take(kQueries * K_ + gemm::kPanel), *ds = take(kQueries * pitch_);
    // Sums over blocks and query heads.
    float *dk = zeros(L_ * K_ + gemm::kPanel), *dv = zeros(L_ * K_ + gemm::kPanel);
    for_each_block([&](const Block& b) {
      probabilities(b);
      copy_head(gradients.d_out, b, d_out);
      gemm::multiply_ready(b.count, b.columns, K_, rows(d_out, K_), v_transposed, ds, pitch_);
      simd::run<CALDERA_EACH_WIDTH(attention_parts::softmax_backward_rows, float)>(p_, ds, ds, b.count,
                                                                                   b.columns, pitch_, scale_);
      gemm::multiply_ready(b.count, K_, b.keys, rows(ds, pitch_), k, narrow_, K_);
      store_block(gradients.dq, b);
      gemm::multiply_ready(b.keys, K_, b.count, columns(ds, pitch_), as_it_lies(q_), dk, K_,
                           /*accumulate=*/true);
      gemm::multiply_ready(b.keys, K_, b.count, columns(p_, pitch_), as_it_lies(d_out), dv, K_,
                           /*accumulate=*/true);
    });
    for (const auto& [total, target] : {std::pair(dk, &gradients.dk), std::pair(dv, &gradients.dv)})
      panels::store_rows(total, K_, L_, K_, attention_parts::head_of<T>(*target, head_), target->row_stride);
  }

 private:
  static constexpr int64_t kQueries = 48;  // rows of a block

  struct Block {
    int64_t head, begin, count;  // queries
    int64_t first_limit;         // keys that the first of them sees
    int64_t keys;                // keys that the last of them sees
    int64_t columns;             // of panels that hold these
  };
  template <class Function>
  void for_each_block(Function f) const {
    const int64_t heads = sample_.q.heads / sample_.k.heads;
    for (int64_t head = head_ * heads; head < (head_ + 1) * heads; ++head) {
      for (int64_t begin = 0; begin < N_; begin += kQueries) {
        const int64_t count = std::min(kQueries, N_ - begin), before = causal_ ? L_ - N_ + begin : L_;
        const int64_t keys = causal_ ? before + count : L_;
        f(Block{head, begin, count, causal_ ? before + 1 : L_, keys, filled(keys)});
      }
    }
  }

  static int64_t filled(int64_t count) { return (count + gemm::kPanel - 1) / gemm::kPanel * gemm::kPanel; }
  // So many cache lines that the rows of a column do not all fall on the same few places of the caches.
  static int64_t odd_pitch(int64_t count) {
    const int64_t lines = filled(count) / gemm::kPanel;
    return (lines + 1 - lines % 2) * gemm::kPanel;
  }

  float* take(int64_t count) { return scratch_.take<float>(count); }
  float* zeros(int64_t count) {
    float* x = take(count);
    std::fill_n(x, count, 0.0f);
    return x;
  }

  static gemm::Left rows(const float* x, int64_t pitch) { return {x, pitch, pitch, true}; }
  static gemm::Left columns(const float* x, int64_t pitch) { return {x, 1, pitch, false}; }
  // The right factor x [rows of a block, K].
  gemm::Right as_it_lies(const float* x) const { return {x, K_, gemm::kPanel}; }

  gemm::Matrix matrix(const AttentionRows& x, int64_t head, int64_t begin) const {
    return {attention_parts::head_of<T>(x, head) + begin * x.row_stride, sizeof(T) == 2, x.row_stride, 1};
  }
  // The key head's rows of x [L, K] as a right factor, and their transpose.
  gemm::Right panels(const AttentionRows& x) {
    float* y = take(L_ * filled(K_));
    gemm::pack_right(matrix(x, head_, 0), L_, K_, y, L_ * gemm::kPanel);
    return {y, gemm::kPanel, L_ * gemm::kPanel};
  }
  gemm::Right transposed_panels(const AttentionRows& x) {
    float* y = take(K_ * filled(L_));
    gemm::Matrix transposed = matrix(x, head_, 0);
    std::swap(transposed.row_stride, transposed.col_stride);
    gemm::pack_right(transposed, K_, L_, y, K_ * gemm::kPanel);
    return {y, gemm::kPanel, K_ * gemm::kPanel};
  }
  void copy_head(const AttentionRows& x, const Block& b, float* y) const {
    gemm::pack_left(matrix(x, b.head, b.begin), b.count, K_, y);
  }

  // Queries into q_, their probabilities into p_.
  void probabilities(const Block& b) {
    copy_head(sample_.q, b, q_);
    gemm::multiply_ready(b.count, b.columns, K_, rows(q_, K_), k_transposed_, p_, pitch_);
    simd::run<CALDERA_EACH_WIDTH(attention_parts::softmax_rows, float)>(
        p_, p_, b.count, b.count, b.columns, pitch_, scale_, causal_, b.first_limit);
  }
  void store_block(const AttentionRows& target, const Block& b) const {
    panels::store_rows(narrow_, K_, b.count, K_,
                       attention_parts::head_of<T>(target, b.head) + b.begin * target.row_stride,
                       target.row_stride);
  }

  const AttentionSample& sample_;
  const int64_t head_;
  const bool causal_;
  attention_parts::Scratch& scratch_;
  const int64_t N_, L_, K_, pitch_;
  const float scale_;
  gemm::Right k_transposed_;
  float *q_, *p_, *narrow_;
};

}  // namespace caldera
