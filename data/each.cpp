#include "data/each.h"

#include <algorithm>
#include <future>
#include <thread>
#include <vector>

#include "base/threads.h"

namespace caldera {

void for_each_index(size_t count, const std::function<void(size_t)>& work,
                    const std::function<void(int64_t)>& progress) {
  constexpr size_t kPerThread = 100;
  const size_t num_threads = std::max(std::thread::hardware_concurrency(), 1u);
  ThreadPool pool(static_cast<int>(num_threads));
  for (size_t begin = 0; begin < count; begin += num_threads * kPerThread) {
    if (progress) progress(static_cast<int64_t>(begin));
    std::vector<std::future<void>> parts;
    for (size_t t = 0; t < num_threads; ++t) {
      const size_t first = std::min(begin + t * kPerThread, count),
                   last = std::min(first + kPerThread, count);
      parts.push_back(pool.submit([&work, first, last] {
        for (size_t i = first; i < last; ++i) work(i);
      }));
    }
    for (std::future<void>& part : parts) part.get();
  }
  if (progress) progress(static_cast<int64_t>(count));
}

}  // namespace caldera
