// Work in background threads whose results come back in order.
#pragma once
#include <ATen/Parallel.h>
#include <omp.h>

#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <future>
#include <mutex>
#include <thread>
#include <vector>

#include "base/headway.h"

namespace caldera {

// The calling thread works alone from here on. OpenMP counts the threads of all teams, of those that idle as well, until the
// thread that began them ends: with a second team beside training's they are more than the cores, and then all of them
// sleep at each wait instead of spinning.
inline void work_without_a_team() {
  at::internal::lazy_init_num_threads();  // would set the number later
  ::omp_set_num_threads(1);
}

// A fixed set of threads, each of which works alone. submit() queues a job; its result or exception arrives through the
// future, so the caller's order of get() is the order of results whatever the number of threads. The destructor drops
// jobs not yet begun. The headway of a job goes to the counter of the thread that submitted it, which must outlive
// the job or the pool.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads) {
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~ThreadPool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
      jobs_.clear();
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  template <class Function>
  auto submit(Function function) -> std::future<decltype(function())> {
    auto task = std::make_shared<std::packaged_task<decltype(function())()>>(std::move(function));
    auto result = task->get_future();
    {
      const std::lock_guard lock(mutex_);
      jobs_.emplace_back([task, counter = headway_counter()] {
        const HeadwayScope scope(counter);
        (*task)();
      });
    }
    wake_.notify_one();
    return result;
  }

 private:
  void work() {
    work_without_a_team();
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return stop_ || !jobs_.empty(); });
        if (stop_) return;
        job = std::move(jobs_.front());
        jobs_.pop_front();
      }
      job();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  std::vector<std::thread> threads_;
  bool stop_ = false;
};

}  // namespace caldera
