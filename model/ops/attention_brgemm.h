// One key head of attention by oneDNN's inner kernel, LibTorch's brgemm, where the processor has AVX-512, and
// by what LibTorch puts in its place elsewhere.
#pragma once
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "model/ops/attention_parts.h"
#include "model/ops/panels.h"

namespace caldera {

// T is what tensors hold, C what products multiply. Legend: K head width, N query rows and L key rows of one
// sample.
template <class T, class C>
class BrgemmKeyHead {
 public:
  static constexpr bool kUsesOneDnn = true;

  BrgemmKeyHead(const AttentionSample& sample, int64_t head, bool causal, attention_parts::Scratch& scratch)
      : sample_(sample),
        head_(head),
        causal_(causal),
        scratch_(scratch),
        N_(sample.q.count),
        L_(sample.k.count),
        K_(sample.q.width),
        width_(panels::filled(K_)),
        keys_(panels::filled(L_)),
        scale_(1.0f / std::sqrt(static_cast<float>(K_))) {
    scratch_.reset();
    k_ = copied(sample.k, head, L_);
    v_ = copied(sample.v, head, L_);
    k_transposed_ = take(keys_ * width_);
    panels::make_transposed_panels(k_, keys_, width_, k_transposed_);
    q_ = take(kQueries * width_);
    p_ = take(kQueries * keys_);
    scores_ = scratch_.take<float>(kQueries * keys_);
    narrow_ = scratch_.take<float>(kQueries * width_);
  }

  void forward(const AttentionRows& out) {
    C* v_panels = take(keys_ * width_);
    panels::make_panels(v_, keys_, width_, v_panels);
    for_each_block([&](const Block& b) {
      probabilities(b);
      multiply(b.rows, width_, b.columns, p_, b.columns, v_panels, keys_, narrow_, width_);
      store_block(out, b);
    });
  }

  void backward(const AttentionGradients& gradients) {
    C* k_panels = take(keys_ * width_);
    panels::make_panels(k_, keys_, width_, k_panels);
    C* v_transposed = take(keys_ * width_);
    panels::make_transposed_panels(v_, keys_, width_, v_transposed);
    C *d_out = take(kQueries * width_), *ds = take(kQueries * keys_),
      *right = take(kQueries * std::max(keys_, width_)), *left = take(kQueries * width_);
    float* dp = scratch_.take<float>(kQueries * keys_);
    // Sums over blocks and query heads, transposed: [K, L].
    float *dk = zeros(width_ * keys_), *dv = zeros(width_ * keys_);
    // total [K, L] += x^T y, of x [rows, K] and y [rows, columns].
    const auto add_product = [&](const Block& b, const C* x, const C* y, float* total) {
      panels::make_panels(x, b.rows, width_, right);
      panels::transpose_panels(right, b.rows, width_, left);
      panels::make_panels(y, b.rows, b.columns, right);
      multiply(width_, b.columns, b.rows, left, b.rows, right, b.rows, total, keys_, /*add=*/true);
    };
    for_each_block([&](const Block& b) {
      probabilities(b);
      copy_head(gradients.d_out, b.head, b.begin, b.count, d_out);
      multiply(b.rows, b.columns, width_, d_out, width_, v_transposed, width_, dp, b.columns);
      simd::run<CALDERA_EACH_WIDTH(attention_parts::softmax_backward_rows, C)>(scores_, dp, ds, b.rows,
                                                                               b.columns, b.columns, scale_);
      multiply(b.rows, width_, b.columns, ds, b.columns, k_panels, keys_, narrow_, width_);
      store_block(gradients.dq, b);
      add_product(b, q_, ds, dk);
      add_product(b, d_out, p_, dv);
    });
    float* rows = scratch_.take<float>(width_ * keys_);
    for (const auto& [total, target] : {std::pair(dk, &gradients.dk), std::pair(dv, &gradients.dv)}) {
      panels::transpose_words(panels::words(total), keys_, width_, keys_, panels::words(rows), width_);
      panels::store_rows(rows, width_, L_, K_, attention_parts::head_of<T>(*target, head_),
                         target->row_stride);
    }
  }

 private:
  static constexpr int64_t kQueries = 64;  // rows of a block

  struct Block {
    int64_t head, begin, count;  // queries
    int64_t rows;                // filled up
    int64_t first_limit;         // keys that the first of them sees
    int64_t columns;             // keys that the last of them sees, filled up
  };
  template <class Function>
  void for_each_block(Function f) const {
    const int64_t heads = sample_.q.heads / sample_.k.heads;
    for (int64_t head = head_ * heads; head < (head_ + 1) * heads; ++head) {
      for (int64_t begin = 0; begin < N_; begin += kQueries) {
        const int64_t count = std::min(kQueries, N_ - begin);
        f(Block{head, begin, count, panels::filled(count), causal_ ? L_ - N_ + begin + 1 : L_,
                panels::filled(causal_ ? L_ - N_ + begin + count : L_)});
      }
    }
  }

  C* take(int64_t count) { return scratch_.take<C>(count); }
  float* zeros(int64_t count) {
    float* x = scratch_.take<float>(count);
    std::fill_n(x, count, 0.0f);
    return x;
  }
  void copy_head(const AttentionRows& x, int64_t head, int64_t begin, int64_t count, C* y) const {
    panels::copy_rows(attention_parts::head_of<T>(x, head) + begin * x.row_stride, x.row_stride, count, K_,
                      y);
  }
  C* copied(const AttentionRows& x, int64_t head, int64_t count) {
    C* y = take(panels::filled(count) * width_);
    copy_head(x, head, 0, count, y);
    return y;
  }

  // out [rows, cols] (+)= a [rows, depth] times panels of `panel_rows` rows, the first `depth` of which
  // count.
  static void multiply(int64_t rows, int64_t cols, int64_t depth, const C* a, int64_t ld_a, const C* right,
                       int64_t panel_rows, float* out, int64_t ld_out, bool add = false) {
    for (int64_t c = 0; c < cols;
         c += panels::kUnit, right += panel_rows * panels::kUnit, out += panels::kUnit)
      at::native::cpublas::brgemm(rows, panels::kUnit, depth, ld_a, panels::kUnit, ld_out, add, a, right, out,
                                  /*is_vnni=*/panels::kInWord<C> == 2);
  }

  // Queries into q_, their probabilities into scores_ and, rounded, p_.
  void probabilities(const Block& b) {
    copy_head(sample_.q, b.head, b.begin, b.count, q_);
    multiply(b.rows, b.columns, width_, q_, width_, k_transposed_, width_, scores_, b.columns);
    simd::run<CALDERA_EACH_WIDTH(attention_parts::softmax_rows, C)>(
        scores_, p_, b.count, b.rows, b.columns, b.columns, scale_, causal_, b.first_limit);
  }
  void store_block(const AttentionRows& target, const Block& b) const {
    panels::store_rows(narrow_, width_, b.count, K_,
                       attention_parts::head_of<T>(target, b.head) + b.begin * target.row_stride,
                       target.row_stride);
  }

  const AttentionSample& sample_;
  const int64_t head_;
  const bool causal_;
  attention_parts::Scratch& scratch_;
  const int64_t N_, L_, K_, width_, keys_;
  const float scale_;
  C *k_, *v_, *k_transposed_, *q_, *p_;
  float *scores_, *narrow_;
};

}  // namespace caldera
