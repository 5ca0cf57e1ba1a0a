#include "model/ops/attend_one.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/simd.h"

// Legend: H query heads, G key/value heads, K head width, L keys.
namespace caldera {
namespace {

using namespace simd;

constexpr int64_t kKeys = 4;   // whose scores are added up at once
constexpr int64_t kParts = 4;  // vectors of the result at once

// One key head: its keys and values, `stride` elements apart, and the queries and results of `group` heads.
template <class T>
struct SharedKeyHead {
  const T *q, *k, *v;
  T* out;
  int64_t group, num_keys, stride, width;
};

CALDERA_INLINE Vec4 quarter(const Vec4& v) { return v; }
template <Vector V>
CALDERA_INLINE Vec4 quarter(const V& v) {
  typename Types<kLanesOf<V> / 2>::Vec halves[2];
  std::memcpy(halves, &v, sizeof v);
  return quarter(halves[0] + halves[1]);
}
// The lanes of four vectors, added up.
template <Vector V>
CALDERA_INLINE Vec4 sums(const V* v) {
  using Places = Types<4>::Ints;
  constexpr Places kLow = {0, 4, 1, 5}, kHigh = {2, 6, 3, 7}, kFirst = {0, 1, 4, 5}, kSecond = {2, 3, 6, 7};
  const Vec4 a = quarter(v[0]), b = quarter(v[1]), c = quarter(v[2]), d = quarter(v[3]);
  const Vec4 ab = __builtin_shuffle(a, b, kLow) + __builtin_shuffle(a, b, kHigh);
  const Vec4 cd = __builtin_shuffle(c, d, kLow) + __builtin_shuffle(c, d, kHigh);
  return __builtin_shuffle(ab, cd, kFirst) + __builtin_shuffle(ab, cd, kSecond);
}

// scores [kHeads, pitch] of kHeads queries. Beyond the last key they are written up to a multiple of kKeys.
template <class V, int kHeads, class T>
CALDERA_INLINE void score(const SharedKeyHead<T>& head, const float* q, float* scores, int64_t pitch) {
  for (int64_t j = 0; j < head.num_keys; j += kKeys) {
    const T* keys[kKeys];
    for (int64_t n = 0; n < kKeys; ++n) keys[n] = head.k + std::min(j + n, head.num_keys - 1) * head.stride;
    V products[kHeads * kKeys] = {};
    const auto add = [&](int64_t i, int64_t count) CALDERA_ALWAYS {
      V key[kKeys];
#pragma GCC unroll 4
      for (int64_t n = 0; n < kKeys; ++n) key[n] = load<V>(keys[n] + i, count);
#pragma GCC unroll 2
      for (int r = 0; r < kHeads; ++r) {
        const V query = load<V>(q + r * head.width + i, count);
#pragma GCC unroll 4
        for (int64_t n = 0; n < kKeys; ++n) products[r * kKeys + n] += query * key[n];
      }
    };
    int64_t i = 0;
    for (; i + kLanesOf<V> <= head.width; i += kLanesOf<V>) add(i, kLanesOf<V>);
    if (i < head.width) add(i, head.width - i);
#pragma GCC unroll 2
    for (int r = 0; r < kHeads; ++r) store(scores + r * pitch + j, sums(products + r * kKeys));
  }
}

// In place: x [count] becomes softmax(scale * x), up to a factor that is returned. Filled up to `pitch` with
// zeros.
template <class V>
CALDERA_INLINE float soften(float* x, int64_t count, int64_t pitch, float scale) {
  std::fill(x + count, x + pitch, -std::numeric_limits<float>::infinity());
  V best = load<V>(x);
  for (int64_t i = kLanesOf<V>; i < pitch; i += kLanesOf<V>) best = simd::max(best, load<V>(x + i));
  const float top = maximum(best);
  V total = {};
  for (int64_t i = 0; i < pitch; i += kLanesOf<V>) {
    const V e = exp((load<V>(x + i) - top) * scale);
    total += e;
    store(x + i, e);
  }
  return 1 / sum(total);
}

// out [kHeads, K] = factor of each times p [kHeads, pitch] times the values.
template <class V, int kHeads, class T>
CALDERA_INLINE void weigh(const SharedKeyHead<T>& head, const float* p, int64_t pitch, const float* factors,
                          T* out) {
  for (int64_t begin = 0; begin < head.width; begin += kParts * kLanesOf<V>) {
    V totals[kHeads * kParts] = {};
    const auto add = [&](auto load_part) CALDERA_ALWAYS {
      for (int64_t j = 0; j < head.num_keys; ++j) {
        const T* value = head.v + j * head.stride + begin;
        V parts[kParts];
#pragma GCC unroll 4
        for (int64_t n = 0; n < kParts; ++n) parts[n] = load_part(value, n * kLanesOf<V>);
#pragma GCC unroll 2
        for (int r = 0; r < kHeads; ++r) {
          const V weight = splat<V>(p[r * pitch + j]);
#pragma GCC unroll 4
          for (int64_t n = 0; n < kParts; ++n) totals[r * kParts + n] += weight * parts[n];
        }
      }
    };
    const int64_t count = head.width - begin;
    const auto left = [count](int64_t i)
                          CALDERA_ALWAYS { return std::clamp<int64_t>(count - i, 0, kLanesOf<V>); };
    if (count >= kParts * kLanesOf<V>)
      add([](const T* x, int64_t i) CALDERA_ALWAYS { return load<V>(x + i); });
    else
      add([&](const T* x, int64_t i) CALDERA_ALWAYS { return load<V>(x + i, left(i)); });
    for (int r = 0; r < kHeads; ++r) {
      for (int64_t n = 0; n < kParts; ++n) {
        const int64_t i = n * kLanesOf<V>;
        store(out + r * head.width + begin + i, V(totals[r * kParts + n] * factors[r]), left(i));
      }
    }
  }
}

template <class V, int kHeads, class T>
CALDERA_INLINE void attend_heads(const SharedKeyHead<T>& head, int64_t first, float* scratch) {
  const int64_t pitch = (head.num_keys + kLanes - 1) / kLanes * kLanes, width = head.width;
  float *q = scratch + kHeads * pitch, factors[kHeads];
  for (int64_t i = 0; i < kHeads * width; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, kHeads * width - i);
    store(q + i, load<V>(head.q + first * width + i, n), n);
  }
  score<V, kHeads>(head, q, scratch, pitch);
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  for (int r = 0; r < kHeads; ++r) factors[r] = soften<V>(scratch + r * pitch, head.num_keys, pitch, scale);
  weigh<V, kHeads>(head, scratch, pitch, factors, head.out + first * width);
}

// `scratch`: two rows of scores, filled up to kLanes, and two queries.
template <class V, class T>
CALDERA_INLINE void attend_key_head(const SharedKeyHead<T>& head, float* scratch) {
  int64_t h = 0;
  for (; h + 2 <= head.group; h += 2) attend_heads<V, 2>(head, h, scratch);
  if (h < head.group) attend_heads<V, 1>(head, h, scratch);
}

template <class T>
void attend_task(const AttentionSample& sample, const AttentionRows& out, int64_t g) {
  const auto& [q, k, v] = sample;
  const int64_t group = q.heads / k.heads, width = q.width, first = g * group * width;
  const SharedKeyHead<T> head = {.q = static_cast<const T*>(q.data) + first,
                           .k = static_cast<const T*>(k.data) + g * width,
                           .v = static_cast<const T*>(v.data) + g * width,
                           .out = static_cast<T*>(out.data) + first,
                           .group = group,
                           .num_keys = k.count,
                           .stride = k.heads * width,
                           .width = width};
  thread_local std::vector<float> scratch;
  scratch.resize(std::max(scratch.size(), static_cast<size_t>(2 * (k.count + kLanes + width))));
  simd::run<CALDERA_EACH_WIDTH(attend_key_head, T)>(head, scratch.data());
}

}  // namespace

void attend_one_query(const std::vector<AttentionSample>& samples,
                            const std::vector<AttentionRows>& out) {
  std::vector<std::pair<size_t, int64_t>> tasks;
  int64_t num_elements = 0;
  for (size_t s = 0; s < samples.size(); ++s) {
    const auto& [q, k, v] = samples[s];
    CALDERA_ASSERT(k.heads > 0 && q.heads % k.heads == 0 && q.width == k.width && q.dtype == k.dtype);
    CALDERA_ASSERT(k.count > 0 && k.count == v.count && k.heads == v.heads && k.width == v.width &&
                   k.dtype == v.dtype);
    CALDERA_ASSERT(out[s].count == 1 && out[s].heads == q.heads && out[s].width == q.width &&
                   out[s].dtype == q.dtype);
    CALDERA_ASSERT(q.count == 1 && q.is_dense() && k.is_dense() && v.is_dense() && out[s].is_dense());
    num_elements += 2 * k.num_elements();
    for (int64_t g = 0; g < k.heads; ++g) tasks.emplace_back(s, g);
  }
  if (tasks.empty()) return;
  std::atomic<size_t> next = 0;
  const auto work = [&] {
    with_cpu_type(samples[0].q.dtype, [&]<class T>(T*) {
      for (size_t t = next++; t < tasks.size(); t = next++)
        attend_task<T>(samples[tasks[t].first], out[tasks[t].first], tasks[t].second);
    });
  };
  if (tasks.size() < 2 || num_elements < row_grain(1)) return work();
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) { work(); });
}

}  // namespace caldera
