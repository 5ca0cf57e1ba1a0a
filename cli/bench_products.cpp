// caldera bench products: how fast this processor multiplies matrices, beside its peak and LibTorch's own products, in one run
// (CALDERA_CPU holds all of them to less). Speeds are medians; contenders take turns.
#include <ATen/Parallel.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <vector>

#include "base/aten.h"
#include "base/simd_level.h"
#include "cli/bench.h"
#include "model/ops/matmul.h"

namespace caldera {
namespace {

// So many times ten multiply-adds of whole vectors, which wait for nothing but their own last result.
template <class V>
CALDERA_INLINE float multiply_adds(int64_t count) {
  const V factor = V{} + 0.999f, term = V{} + 1e-3f;
  // (Each begins elsewhere: the compiler makes one of those that are equal.)
  V a = term, b = a + term, c = b + term, d = c + term, e = d + term, f = e + term, g = f + term, h = g + term, i = h + term,
    j = i + term;
  for (int64_t n = 0; n < count; ++n) {
    a = a * factor + term, b = b * factor + term, c = c * factor + term, d = d * factor + term, e = e * factor + term;
    f = f * factor + term, g = g * factor + term, h = h * factor + term, i = i * factor + term, j = j * factor + term;
  }
  const V all = a + b + c + d + e + f + g + h + i + j;
  return all[0];
}

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// GFLOP/s of all threads.
double peak() {
  constexpr int64_t kCount = 4'000'000;
  const int64_t lanes = simd::level() == simd::Level::kAvx512 ? 16 : simd::level() == simd::Level::kAvx2 ? 8 : 4;
  std::vector<float> results(static_cast<size_t>(at::get_num_threads()));
  const double seconds = seconds_of([&] {
    at::parallel_for(0, std::ssize(results), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        results[static_cast<size_t>(t)] = simd::run<CALDERA_EACH_WIDTH(multiply_adds)>(kCount);
    });
  });
  return static_cast<double>(std::ssize(results) * kCount * 10 * 2 * lanes) / seconds / 1e9;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

void bench_products(int64_t rounds) {
  const at::NoGradGuard no_grad;
  fmt::print("{}, {} threads; shares of the peak of a loop of multiply-adds\n", cpu_text(), at::get_num_threads());
  fmt::print("{:>6} {:>6} {:>6}  {:>12} {:>12} {:>12} {:>12}\n", "M", "K", "N", "GFLOP/s peak", "float32", "bfloat16",
             "at::mm");
  for (const int64_t M : {256, 1400}) {
    for (const auto& [K, N] : std::vector<std::pair<int64_t, int64_t>>{
             {192, 192}, {192, 768}, {576, 192}, {576, 576}, {576, 1536}, {1536, 576}, {768, 768}, {2048, 2048}}) {
      const at::Tensor x = at::rand({M, K}), weight = at::rand({N, K}), plain = at::empty({M, N});
      const at::Tensor x_half = x.to(at::kBFloat16), weight_half = weight.to(at::kBFloat16);
      const double gigaflop = 2e-9 * static_cast<double>(M * K * N);
      const auto repeats = static_cast<int>(std::max(1.0, 2.0 / gigaflop));
      std::vector<double> peaks, ours, halves, theirs;
      const auto measure = [&](std::vector<double>& speeds, const std::function<void()>& product) {
        product();
        speeds.push_back(repeats * gigaflop / seconds_of([&] {
                           for (int i = 0; i < repeats; ++i) product();
                         }));
      };
      at::Tensor out = plain;
      for (int64_t round = 0; round < rounds; ++round) {
        peaks.push_back(peak());
        measure(ours, [&] { matrix_product(x, weight.t()); });
        measure(halves, [&] { matrix_product(x_half, weight_half.t()); });
        measure(theirs, [&] { at::mm_out(out, x, weight.t()); });
      }
      const double most = median(peaks);
      fmt::print("{:>6} {:>6} {:>6}  {:>12.0f} {:>12.2f} {:>12.2f} {:>12.2f}\n", M, K, N, most, median(ours) / most,
                 median(halves) / most, median(theirs) / most);
      std::fflush(stdout);
    }
  }
}

}  // namespace caldera
