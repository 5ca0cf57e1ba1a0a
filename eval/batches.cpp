#include "eval/batches.h"

#include <algorithm>
#include <future>

#include "base/threads.h"

namespace caldera {

namespace {
constexpr int64_t kWindow = 256;  // samples whose pictures are in memory at once
constexpr int kNumThreads = 2;
}  // namespace

void visit_batches(
    const SampleSource& source, int64_t max_tokens,
    const std::function<void(const std::vector<int64_t>& indices, const PackedBatch& batch)>& visit) {
  ThreadPool pool(kNumThreads);
  for (int64_t begin = 0; begin < source.num_samples; begin += kWindow) {
    const int64_t end = std::min(begin + kWindow, source.num_samples);
    std::vector<int64_t> lengths;
    for (int64_t i = begin; i < end; ++i) lengths.push_back(source.num_tokens(i));
    std::vector<std::vector<int64_t>> plan = plan_micro_batches(lengths, max_tokens);
    std::vector<std::future<PackedBatch>> batches;
    for (std::vector<int64_t>& indices : plan) {
      for (int64_t& index : indices) index += begin;
      batches.push_back(pool.submit([&source, indices] {
        std::vector<Sample> samples;
        for (const int64_t index : indices) samples.push_back(source.make(index));
        return pack(samples);
      }));
    }
    for (size_t i = 0; i < plan.size(); ++i) visit(plan[i], batches[i].get());
  }
}

}  // namespace caldera
