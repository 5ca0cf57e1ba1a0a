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
