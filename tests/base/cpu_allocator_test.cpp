// The cache of the CPU's large blocks: reuse, the bound on what is kept, and that numbers survive it.
#include "base/cpu_allocator.h"
#include "tests/aten.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <fstream>
#include <random>
#include <thread>
#include <vector>

namespace caldera {
namespace {

constexpr int64_t kMiB = 1 << 20;
at::Tensor block(int64_t mib) { return at::empty({mib * kMiB}, at::kByte); }

class CpuAllocator : public ::testing::Test {
 protected:
  void SetUp() override {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    GTEST_SKIP() << "the arena is off under sanitizers, which would not see into it";
#endif
    use_caching_cpu_allocator();
  }
};

TEST_F(CpuAllocator, GivesWhatWasFreedToTheNext) {
  const void* first = block(40).data_ptr();
  EXPECT_EQ(block(40).data_ptr(), first);
  EXPECT_EQ(block(39).data_ptr(), first);
  const at::Tensor held = block(40), other = block(40);
  EXPECT_NE(held.data_ptr(), other.data_ptr());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(held.data_ptr()) % 64, 0u);
}

TEST_F(CpuAllocator, JoinsFreeNeighbours) {
  const void* first = nullptr;
  {
    const at::Tensor a = block(10), b = block(20), c = block(10);
    first = std::min({a.data_ptr(), b.data_ptr(), c.data_ptr()});
  }
  EXPECT_EQ(block(40).data_ptr(), first);
}

TEST_F(CpuAllocator, NeverKeepsMuchMoreThanWasAliveAtOnce) {
  std::vector<at::Tensor> held;
  for (int64_t mib = 3; mib < 200; mib += 3) {
    // Every other block stays: none of the free ones between them is large enough for the next.
    held.push_back(block(mib));
    const at::Tensor passing = block(2 * mib);
    if (held.size() > 8) held.erase(held.begin(), held.begin() + 5);
    const CpuMemory now = cpu_memory();
    EXPECT_LE(static_cast<double>(now.live_bytes + now.cached_bytes),
              1.25 * static_cast<double>(now.peak_live_bytes) + 1)
        << mib;
  }
}

// As loading does: twice what stays was alive for a while.
TEST_F(CpuAllocator, GivesBackWhatLoadingLeftAndFollowsWhatLives) {
  const auto resident = [] {
    int64_t pages = 0, of_process = 0;
    std::ifstream("/proc/self/statm") >> pages >> of_process;
    return of_process * ::sysconf(_SC_PAGE_SIZE) / kMiB;
  };
  const at::Tensor model = at::full({64 * kMiB}, 7, at::kByte);
  { const at::Tensor as_read = at::full({512 * kMiB}, 1, at::kByte); }
  EXPECT_GE(cpu_memory().cached_bytes, 512 * kMiB);
  const int64_t before = resident();
  settle_cpu_memory();
  const CpuMemory settled = cpu_memory();
  EXPECT_LE(settled.cached_bytes, settled.live_bytes / 4);
  EXPECT_LE(resident(), before - 450);
  EXPECT_TRUE(model.eq(7).all().item<bool>());
  EXPECT_GE(settled.peak_live_bytes, 576 * kMiB);  // the run's own, still
  // Steps that follow keep what they free, and no more.
  int64_t most = settled.live_bytes;
  for (int step = 0; step < 3; ++step) {
    const at::Tensor activations = block(100);
    most = std::max(most, cpu_memory().live_bytes);
  }
  EXPECT_GE(cpu_memory().cached_bytes, 100 * kMiB);
  EXPECT_LE(static_cast<double>(cpu_memory().live_bytes + cpu_memory().cached_bytes),
            1.25 * static_cast<double>(most) + 1);
}

// Blocks taken, freed and settled in any order: none is given away or emptied while it lives, and what is
// counted as idle is bounded all along.
TEST_F(CpuAllocator, KeepsItsBooksInAnyOrder) {
  std::minstd_rand random(7);
  std::vector<std::pair<at::Tensor, uint8_t>> held;
  settle_cpu_memory();
  int64_t most = cpu_memory().live_bytes;
  for (int i = 0; i < 3000; ++i) {
    if (random() % 5 < 2 && !held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      const auto& [tensor, value] = held.back();
      const uint8_t* bytes = tensor.const_data_ptr<uint8_t>();
      ASSERT_EQ(bytes[0], value);
      ASSERT_EQ(bytes[tensor.numel() / 2], value);
      ASSERT_EQ(bytes[tensor.numel() - 1], value);
      held.pop_back();
    } else if (held.size() < 40) {
      const auto value = static_cast<uint8_t>(random() % 256);
      const at::Tensor tensor = at::empty({static_cast<int64_t>(300'000 + random() % 3'000'000)}, at::kByte);
      uint8_t* bytes = tensor.mutable_data_ptr<uint8_t>();
      bytes[0] = bytes[tensor.numel() / 2] = bytes[tensor.numel() - 1] = value;
      held.emplace_back(tensor, value);
      most = std::max(most, cpu_memory().live_bytes);
      const CpuMemory now = cpu_memory();
      ASSERT_GE(now.cached_bytes, 0);
      ASSERT_LE(static_cast<double>(now.live_bytes + now.cached_bytes), 1.25 * static_cast<double>(most) + 1);
    }
    if (random() % 100 != 0) continue;
    settle_cpu_memory();
    most = cpu_memory().live_bytes;
    ASSERT_LE(cpu_memory().cached_bytes, most / 4);
  }
  held.clear();
  settle_cpu_memory();
  EXPECT_LE(cpu_memory().cached_bytes, cpu_memory().live_bytes / 4);
}

TEST_F(CpuAllocator, CountsWhatIsAlive) {
  const int64_t before = cpu_memory().live_bytes;
  const at::Tensor held = block(64);
  EXPECT_EQ(cpu_memory().live_bytes - before, 64 * kMiB);
}

TEST_F(CpuAllocator, ServesManyThreads) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([t, &wrong] {
      for (int i = 0; i < 50; ++i) {
        const at::Tensor mine = at::full({kMiB}, t * 1000 + i, at::kFloat);
        std::this_thread::yield();
        if (!mine.eq(t * 1000 + i).all().item<bool>()) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// In a process of its own, which may have 2 GiB of addresses more than it has.
TEST_F(CpuAllocator, DoesWithoutAnArenaWhereAddressesAreLimited) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto allocate = [] {
    rlim_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t limit = pages * static_cast<rlim_t>(::sysconf(_SC_PAGE_SIZE)) + (rlim_t{2} << 30);
    const rlimit limits{limit, limit};
    if (::setrlimit(RLIMIT_AS, &limits) != 0) ::_exit(1);
    {
      const at::Tensor held = block(64);
      std::memset(held.data_ptr(), 1, held.nbytes());
    }
    ::_exit(cpu_memory().peak_live_bytes == 0 ? 0 : 2);
  };
  EXPECT_EXIT(allocate(), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace caldera
