#include "model/ops/attention_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <atomic>

#include "base/error.h"
#include "model/ops/attention_brgemm.h"
#include "model/ops/attention_gemm.h"
#include "model/ops/autograd.h"
#include "model/ops/matmul.h"

namespace caldera {
namespace {

using attention_parts::Scratch;
using panels::kUnit;

// Whether bfloat16 is multiplied as it is. Where LibTorch's inner kernel does not take it, that says so by
// throwing.
bool multiplies_bfloat16() {
  static const bool result = [] {
    if (product_way(at::kBFloat16) != ProductWay::kOneDnn) return false;
    const std::vector<c10::BFloat16> factor(kUnit * kUnit);
    std::vector<float> product(kUnit * kUnit);
    try {
      at::native::cpublas::brgemm(kUnit, kUnit, kUnit, kUnit, kUnit, kUnit, false, factor.data(),
                                  factor.data(), product.data());
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

// Calls f(sample, its key head by the way that this processor takes) for each key head of each sample, on all
// threads.
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
      work.template operator()<BrgemmKeyHead<float, float>>();
    else
      multiplies_bfloat16() ? work.template operator()<BrgemmKeyHead<c10::BFloat16, c10::BFloat16>>()
                            : work.template operator()<BrgemmKeyHead<c10::BFloat16, float>>();
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

void attend_backward(const std::vector<AttentionSample>& samples,
                     const std::vector<AttentionGradients>& gradients, bool causal) {
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
