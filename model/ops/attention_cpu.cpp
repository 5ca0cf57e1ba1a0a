#include "model/ops/attention_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>
#include <cmath>

#include "base/error.h"
#include "model/ops/attention_gemm.h"
#include "model/ops/attention_parts.h"
#include "model/ops/autograd.h"
#include "model/ops/matmul.h"
#include "model/ops/panels.h"
#include "model/ops/simd.h"

// Legend: H query heads, G key/value heads, K head width, N query rows and L key rows of one sample.
namespace caldera {
namespace {

using namespace simd;
using namespace panels;
using namespace attention_parts;

constexpr int64_t kQueries = 64;  // rows of a block

// --- One query

// q [H, K] against keys and values [L, G, K], dense. p [filled(L)] is scratch.
template <class V, class T>
CALDERA_INLINE void attend_one(const T* q, const T* k, const T* v, T* out, float* p, int64_t num_keys, int64_t H,
                               int64_t G, int64_t K) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(K));
  for (int64_t h = 0; h < H; ++h, q += K, out += K) {
    const int64_t head = h / (H / G) * K;
    for (int64_t j = 0; j < num_keys; ++j) {
      const T* key = k + j * G * K + head;
      V products = {};
      for (int64_t i = 0; i < K; i += kLanesOf<V>) {
        const int64_t n = std::min(kLanesOf<V>, K - i);
        products += load<V>(q + i, n) * load<V>(key + i, n);
      }
      p[j] = sum(products);
    }
    softmax_rows<V>(p, p, 1, 1, num_keys, num_keys, scale, /*causal=*/false, num_keys);
    for (int64_t i = 0; i < K; i += kLanesOf<V>) {
      const int64_t n = std::min(kLanesOf<V>, K - i);
      V total = {};
      for (int64_t j = 0; j < num_keys; ++j) total += p[j] * load<V>(v + j * G * K + head + i, n);
      store(out + i, total, n);
    }
  }
}

// --- One key head of one sample

// T is what tensors hold, C what products multiply.
template <class T, class C>
class KeyHead {
 public:
  static constexpr bool kUsesOneDnn = true;

  KeyHead(const AttentionSample& sample, int64_t head, bool causal, Scratch& scratch)
      : sample_(sample),
        head_(head),
        causal_(causal),
        scratch_(scratch),
        N_(sample.q.count),
        L_(sample.k.count),
        K_(sample.q.width),
        width_(filled(K_)),
        keys_(filled(L_)),
        scale_(1.0f / std::sqrt(static_cast<float>(K_))) {
    scratch_.reset();
    k_ = copied(sample.k, head, L_);
    v_ = copied(sample.v, head, L_);
    k_transposed_ = take(keys_ * width_);
    make_transposed_panels(k_, keys_, width_, k_transposed_);
    q_ = take(kQueries * width_);
    p_ = take(kQueries * keys_);
    scores_ = scratch_.take<float>(kQueries * keys_);
    narrow_ = scratch_.take<float>(kQueries * width_);
  }

  void forward(const AttentionRows& out) {
    C* v_panels = take(keys_ * width_);
    make_panels(v_, keys_, width_, v_panels);
    for_each_block([&](const Block& b) {
      probabilities(b);
      multiply(b.rows, width_, b.columns, p_, b.columns, v_panels, keys_, narrow_, width_);
      store_block(out, b);
    });
  }

  void backward(const AttentionGradients& gradients) {
    C* k_panels = take(keys_ * width_);
    make_panels(k_, keys_, width_, k_panels);
    C* v_transposed = take(keys_ * width_);
    make_transposed_panels(v_, keys_, width_, v_transposed);
    C *d_out = take(kQueries * width_), *ds = take(kQueries * keys_), *right = take(kQueries * std::max(keys_, width_)),
      *left = take(kQueries * width_);
    float* dp = scratch_.take<float>(kQueries * keys_);
    // Sums over blocks and query heads, transposed: [K, L].
    float *dk = zeros(width_ * keys_), *dv = zeros(width_ * keys_);
    // total [K, L] += x^T y, of x [rows, K] and y [rows, columns].
    const auto add_product = [&](const Block& b, const C* x, const C* y, float* total) {
      make_panels(x, b.rows, width_, right);
      transpose_panels(right, b.rows, width_, left);
      make_panels(y, b.rows, b.columns, right);
      multiply(width_, b.columns, b.rows, left, b.rows, right, b.rows, total, keys_, /*add=*/true);
    };
    for_each_block([&](const Block& b) {
      probabilities(b);
      copy_head(gradients.d_out, b.head, b.begin, b.count, d_out);
      multiply(b.rows, b.columns, width_, d_out, width_, v_transposed, width_, dp, b.columns);
      simd::run<CALDERA_EACH_WIDTH(softmax_backward_rows, C)>(scores_, dp, ds, b.rows, b.columns, b.columns, scale_);
      multiply(b.rows, width_, b.columns, ds, b.columns, k_panels, keys_, narrow_, width_);
      store_block(gradients.dq, b);
      add_product(b, q_, ds, dk);
      add_product(b, d_out, p_, dv);
    });
    float* rows = scratch_.take<float>(width_ * keys_);
    for (const auto& [total, target] : {std::pair(dk, &gradients.dk), std::pair(dv, &gradients.dv)}) {
      transpose_words(words(total), keys_, width_, keys_, words(rows), width_);
      store_rows(rows, width_, L_, K_, head_of<T>(*target, head_), target->row_stride);
    }
  }

 private:
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
        f(Block{head, begin, count, filled(count), causal_ ? L_ - N_ + begin + 1 : L_,
                filled(causal_ ? L_ - N_ + begin + count : L_)});
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
    copy_rows(head_of<T>(x, head) + begin * x.row_stride, x.row_stride, count, K_, y);
  }
  C* copied(const AttentionRows& x, int64_t head, int64_t count) {
    C* y = take(filled(count) * width_);
    copy_head(x, head, 0, count, y);
    return y;
  }

  // out [rows, cols] (+)= a [rows, depth] times panels of `panel_rows` rows, the first `depth` of which count.
  static void multiply(int64_t rows, int64_t cols, int64_t depth, const C* a, int64_t ld_a, const C* panels,
                       int64_t panel_rows, float* out, int64_t ld_out, bool add = false) {
    for (int64_t c = 0; c < cols; c += kUnit, panels += panel_rows * kUnit, out += kUnit)
      at::native::cpublas::brgemm(rows, kUnit, depth, ld_a, kUnit, ld_out, add, a, panels, out,
                                  /*is_vnni=*/kInWord<C> == 2);
  }

  // Queries into q_, their probabilities into scores_ and, rounded, p_.
  void probabilities(const Block& b) {
    copy_head(sample_.q, b.head, b.begin, b.count, q_);
    multiply(b.rows, b.columns, width_, q_, width_, k_transposed_, width_, scores_, b.columns);
    simd::run<CALDERA_EACH_WIDTH(softmax_rows, C)>(scores_, p_, b.count, b.rows, b.columns, b.columns, scale_, causal_, b.first_limit);
  }
  void store_block(const AttentionRows& target, const Block& b) const {
    store_rows(narrow_, width_, b.count, K_, head_of<T>(target, b.head) + b.begin * target.row_stride, target.row_stride);
  }

  const AttentionSample& sample_;
  const int64_t head_;
  const bool causal_;
  Scratch& scratch_;
  const int64_t N_, L_, K_, width_, keys_;
  const float scale_;
  C *k_, *v_, *k_transposed_, *q_, *p_;
  float *scores_, *narrow_;
};

// Whether bfloat16 is multiplied as it is. Where LibTorch's inner kernel does not take it, that says so by throwing.
bool multiplies_bfloat16() {
  static const bool result = [] {
    if (product_way(at::kBFloat16) != ProductWay::kOneDnn) return false;
    const std::vector<c10::BFloat16> factor(kUnit * kUnit);
    std::vector<float> product(kUnit * kUnit);
    try {
      at::native::cpublas::brgemm(kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, false, factor.data(), factor.data(),
                                  product.data());
      at::native::cpublas::brgemm_release();
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }();
  return result;
}

void check(const AttentionSample& sample) {
  const auto& [q, k, v] = sample;
  CALDERA_ASSERT(k.heads > 0 && q.heads % k.heads == 0 && q.width == k.width && q.dtype == k.dtype);
  CALDERA_ASSERT(k.count == v.count && k.heads == v.heads && k.width == v.width && k.dtype == v.dtype);
}
void check_like(const AttentionRows& x, const AttentionRows& y) {
  CALDERA_ASSERT(x.count == y.count && x.heads == y.heads && x.width == y.width && x.dtype == y.dtype);
}

// Calls f(sample, KeyHead of it) for each key head of each sample, on all threads.
template <class Function>
void for_each_key_head(const std::vector<AttentionSample>& samples, bool causal, Function f) {
  std::vector<std::pair<size_t, int64_t>> tasks;
  int64_t num_elements = 0;
  for (size_t s = 0; s < samples.size(); ++s) {
    const AttentionSample& sample = samples[s];
    check(sample);
    if (sample.q.count == 0) continue;
    num_elements += sample.k.num_elements();
    for (int64_t head = 0; head < sample.k.heads; ++head) tasks.emplace_back(s, head);
  }
  // Samples differ in length, so they are handed out one by one, the longest first.
  std::stable_sort(tasks.begin(), tasks.end(), [&](const auto& a, const auto& b) {
    return samples[a.first].k.count > samples[b.first].k.count;
  });
  std::atomic<size_t> next = 0;
  const auto work = [&]<class Head>() {
    thread_local Scratch scratch;
    for (size_t t = next++; t < tasks.size(); t = next++) {
      Head head(samples[tasks[t].first], tasks[t].second, causal, scratch);
      f(tasks[t].first, head);
    }
    if constexpr (Head::kUsesOneDnn) at::native::cpublas::brgemm_release();
  };
  const auto work_in_type = [&] {
    const at::ScalarType dtype = samples[0].q.dtype;
    if (product_way(dtype) == ProductWay::kOwn)
      dtype == at::kFloat ? work.template operator()<GemmKeyHead<float>>()
                          : work.template operator()<GemmKeyHead<c10::BFloat16>>();
    else if (dtype == at::kFloat)
      work.template operator()<KeyHead<float, float>>();
    else
      multiplies_bfloat16() ? work.template operator()<KeyHead<c10::BFloat16, c10::BFloat16>>()
                            : work.template operator()<KeyHead<c10::BFloat16, float>>();
  };
  if (tasks.empty()) return;
  if (num_elements < row_grain(1)) return work_in_type();
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { work_in_type(); });
}

}  // namespace

AttentionRows::AttentionRows(const at::Tensor& x, int64_t begin, int64_t num_rows)
    : data(static_cast<char*>(x.mutable_data_ptr()) + begin * x.stride(0) * x.element_size()),
      dtype(x.scalar_type()),
      count(num_rows),
      heads(x.size(1)),
      width(x.size(2)),
      row_stride(x.stride(0)),
      head_stride(x.stride(1)) {
  CALDERA_ASSERT(x.dim() == 3 && (x.stride(2) == 1 || width == 1));
  CALDERA_ASSERT(begin >= 0 && count >= 0 && begin + count <= x.size(0));
  CALDERA_ASSERT(dtype == at::kFloat || dtype == at::kBFloat16);
}

void attend(const std::vector<AttentionSample>& samples, const std::vector<AttentionRows>& out, bool causal) {
  for (size_t s = 0; s < samples.size(); ++s) check_like(out[s], samples[s].q);
  for_each_key_head(samples, causal, [&](size_t s, auto& head) { head.forward(out[s]); });
}

void attend_one_query(const std::vector<AttentionSample>& samples, const std::vector<AttentionRows>& out) {
  int64_t num_elements = 0;
  for (size_t s = 0; s < samples.size(); ++s) {
    const auto& [q, k, v] = samples[s];
    check(samples[s]);
    check_like(out[s], q);
    CALDERA_ASSERT(q.count == 1 && q.is_dense() && k.is_dense() && v.is_dense() && out[s].is_dense());
    num_elements += k.num_elements();
  }
  const auto attend_sample = [&](size_t s) {
    const auto& [q, k, v] = samples[s];
    thread_local Scratch scratch;
    scratch.reset();
    float* p = scratch.take<float>(filled(k.count));
    with_cpu_type(q.dtype, [&]<class T>(T*) {
      simd::run<CALDERA_EACH_WIDTH(attend_one, T)>(head_of<T>(q, 0), head_of<T>(k, 0), head_of<T>(v, 0), head_of<T>(out[s], 0), p, k.count,
                               q.heads, k.heads, q.width);
    });
  };
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    for (size_t s = next++; s < samples.size(); s = next++) attend_sample(s);
  };
  if (samples.size() < 2 || num_elements < row_grain(1)) return work();
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { work(); });
}

void attend_backward(const std::vector<AttentionSample>& samples, const std::vector<AttentionGradients>& gradients,
                     bool causal) {
  for (size_t s = 0; s < samples.size(); ++s) {
    const auto& [d_out, dq, dk, dv] = gradients[s];
    check_like(d_out, samples[s].q);
    check_like(dq, samples[s].q);
    check_like(dk, samples[s].k);
    check_like(dv, samples[s].k);
  }
  for_each_key_head(samples, causal, [&](size_t s, auto& head) { head.backward(gradients[s]); });
}

}  // namespace caldera
