// Compiles CUDA kernels as plain C++ and runs them on the CPU: include this, then the .cu files. The threads
// of a block are fibers of one thread; each runs until it must wait for others at __syncthreads or a shuffle.
// Blocks run one after another. What a kernel does then is what it would do on a card, apart from expf and
// the like, which are the C library's.
//
// Seen as faults (std::runtime_error, out of the launch): threads that wait for others which have returned or
// wait elsewhere; loads and stores (device.cuh's) that are not aligned or not within a Buffer. A missing
// __syncthreads shows in results that differ between the two orders of threads.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define CALDERA_KERNELS kernels_on_cpu
#define __global__
#define __device__
#define __shared__ static

struct CudaIndex {
  unsigned x = 0;
};
inline CudaIndex threadIdx, blockIdx;

namespace caldera::cuda_on_cpu {

inline constexpr unsigned kWarpSize = 32, kMaxThreads = 1024;

// The order in which threads run between two points where they wait.
enum class Order { kAscending, kDescending };
inline Order order = Order::kAscending;

// A place where `size` threads wait for each other.
struct Meeting {
  unsigned arrived = 0;
  uint64_t number = 0;  // of times that all have been there
};

class Block {
 public:
  Block()
      : stacks_(std::make_unique_for_overwrite<char[]>(kMaxThreads * kStackBytes)), threads_(kMaxThreads) {}

  void run(unsigned index, unsigned num_threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    num_threads_ = num_threads;
    everyone_ = {};
    warps_.assign((num_threads + kWarpSize - 1) / kWarpSize, {});
    for (unsigned i = 0; i < num_threads; ++i) start(i);
    blockIdx.x = index;
    bool is_alive = true;
    while (is_alive) {
      is_alive = false;
      bool has_moved = false;
      for (unsigned i = 0; i < num_threads; ++i) {
        const unsigned next = order == Order::kAscending ? i : num_threads - 1 - i;
        Thread& thread = threads_[next];
        if (thread.is_done) continue;
        is_alive = true;
        if (thread.meeting && thread.meeting->number == thread.number) continue;
        has_moved = true;
        thread.meeting = nullptr;
        running_ = next;
        threadIdx.x = next;
        swapcontext(&scheduler_, &thread.context);
        if (fault_) throw std::runtime_error(std::exchange(fault_, nullptr));
      }
      if (is_alive && !has_moved) throw std::runtime_error("threads wait for others that do not come");
    }
  }

  void sync_block() { meet(everyone_, num_threads_); }

  float shuffle(float value, unsigned from_lane) {
    const unsigned warp = running_ / kWarpSize;
    values_[running_] = value;
    meet(warps_[warp], kWarpSize);
    const float result = values_[warp * kWarpSize + from_lane];
    meet(warps_[warp], kWarpSize);  // nobody writes the next value before all have read this one
    return result;
  }

  unsigned lane() const { return running_ % kWarpSize; }
  // Exceptions cannot leave a fiber: it stops here for good, and run() throws.
  void fail(const char* what) {
    fault_ = what;
    swapcontext(&threads_[running_].context, &scheduler_);
  }

 private:
  static constexpr size_t kStackBytes = 64 << 10;
  struct Thread {
    ucontext_t context{};
    bool is_done = false;
    Meeting* meeting = nullptr;
    uint64_t number = 0;
  };

  static void enter();

  void start(unsigned i) {
    Thread& thread = threads_[i];
    thread.is_done = false;
    thread.meeting = nullptr;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks_.get() + i * kStackBytes;
    thread.context.uc_stack.ss_size = kStackBytes;
    thread.context.uc_link = &scheduler_;
    makecontext(&thread.context, &Block::enter, 0);
  }

  void meet(Meeting& meeting, unsigned size) {
    if (++meeting.arrived == size) {
      meeting.arrived = 0;
      ++meeting.number;
      return;
    }
    Thread& thread = threads_[running_];
    thread.meeting = &meeting;
    thread.number = meeting.number;
    swapcontext(&thread.context, &scheduler_);
  }

  std::unique_ptr<char[]> stacks_;
  std::vector<Thread> threads_;
  std::vector<Meeting> warps_;
  Meeting everyone_;
  ucontext_t scheduler_{};
  float values_[kMaxThreads] = {};
  const std::function<void()>* kernel_ = nullptr;
  unsigned num_threads_ = 0, running_ = 0;
  const char* fault_ = nullptr;
};

inline Block& block() {
  static Block only;
  return only;
}
inline void Block::enter() {
  Block& self = block();
  (*self.kernel_)();
  self.threads_[self.running_].is_done = true;
}

// The device's memory: what kernels may touch.
inline std::map<const char*, const char*>& buffers() {
  static std::map<const char*, const char*> begin_to_end;
  return begin_to_end;
}
inline bool is_in_buffer(const void* address, size_t bytes) {
  const char* begin = static_cast<const char*>(address);
  const auto after = buffers().upper_bound(begin);
  return after != buffers().begin() && begin + bytes <= std::prev(after)->second;
}

// Memory for `count` elements between guards. It begins at a multiple of 256 bytes, as the allocator's on a
// card, or so many elements behind one.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, size_t elements_behind = 0)
      : count_(count), memory_(count * sizeof(T) + elements_behind * sizeof(T) + 3 * kGuardBytes, kGuard) {
    const size_t past = reinterpret_cast<uintptr_t>(memory_.data()) % kGuardBytes;
    begin_ = memory_.data() + 2 * kGuardBytes - past + elements_behind * sizeof(T);
    buffers()[begin_] = begin_ + count * sizeof(T);
  }
  ~Buffer() { buffers().erase(begin_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return reinterpret_cast<T*>(begin_); }
  size_t num_bytes() const { return count_ * sizeof(T); }
  bool guards_are_whole() const {
    const auto is_guard = [](const char* begin, const char* end) {
      return std::all_of(begin, end, [](char c) { return c == kGuard; });
    };
    return is_guard(memory_.data(), begin_) &&
           is_guard(begin_ + num_bytes(), memory_.data() + memory_.size());
  }

 private:
  static constexpr size_t kGuardBytes = 256;
  static constexpr char kGuard = -1;  // NaN in float32 and bfloat16: what is read there spoils the result
  size_t count_;
  std::vector<char> memory_;
  char* begin_;
};

}  // namespace caldera::cuda_on_cpu

// What the kernels use of CUDA.
inline void __syncthreads() { caldera::cuda_on_cpu::block().sync_block(); }
inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  caldera::cuda_on_cpu::Block& block = caldera::cuda_on_cpu::block();
  if (mask != 0xFFFFFFFFu) block.fail("a shuffle among some threads of a warp");
  return block.shuffle(value, block.lane() ^ static_cast<unsigned>(lane_mask));
}
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

#include "model/ops/cuda/kernels.h"

namespace caldera::CALDERA_KERNELS {

inline void check_access(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    cuda_on_cpu::block().fail("a load or store that is not aligned");
  if (!cuda_on_cpu::is_in_buffer(address, bytes))
    cuda_on_cpu::block().fail("a load or store beyond the memory that was given");
}

// In the place of device.cuh's, which queues the kernel on a stream.
template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int64_t num_blocks, Stream, Arguments... arguments);

}  // namespace caldera::CALDERA_KERNELS

#define CALDERA_CHECK_ACCESS(address, bytes) check_access(address, bytes)
#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int64_t num_blocks, Stream, Arguments... arguments) {
  const std::function<void()> run = [&] { kernel(arguments...); };
  for (int64_t i = 0; i < num_blocks; ++i) cuda_on_cpu::block().run(static_cast<unsigned>(i), kThreads, run);
}

}  // namespace caldera::CALDERA_KERNELS
