#include "base/threads.h"

#include <gtest/gtest.h>

namespace caldera {
namespace {

TEST(ThreadPool, ResultsAndErrorsComeBackInOrder) {
  ThreadPool pool(3);
  std::vector<std::future<int>> results;
  for (int i = 0; i < 50; ++i)
    results.push_back(pool.submit([i] { return i == 17 ? throw std::runtime_error("seventeen") : i * i; }));
  for (int i = 0; i < 50; ++i) {
    if (i == 17)
      EXPECT_THROW(results[17].get(), std::runtime_error);
    else
      EXPECT_EQ(results[static_cast<size_t>(i)].get(), i * i);
  }
}

TEST(ThreadPool, ItsThreadsMakeNoTeams) {
  const int before = at::get_num_threads();
  ThreadPool pool(1);
  const auto threads_of_a_region = [] {
    int count = 0;
#pragma omp parallel reduction(+ : count)
    count += 1;
    return count;
  };
  EXPECT_EQ(pool.submit([] { return at::get_num_threads(); }).get(), 1);
  EXPECT_EQ(pool.submit(threads_of_a_region).get(), 1);
  EXPECT_EQ(at::get_num_threads(), before);
}

TEST(ThreadPool, TheHeadwayOfAJobIsThatOfWhoSubmittedIt) {
  std::atomic<int64_t> counter = 0;
  ThreadPool pool(1);
  {
    const HeadwayScope scope(counter);
    pool.submit([] { note_headway(); }).get();
  }
  EXPECT_EQ(counter, 1);
  pool.submit([] { note_headway(); }).get();
  EXPECT_EQ(counter, 1);
}

}  // namespace
}  // namespace caldera
