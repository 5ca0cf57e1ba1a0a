#include "base/cpu_allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

#include "base/error.h"

namespace caldera {
namespace {

constexpr size_t kSmall = 256 << 10;  // below: malloc, which keeps such blocks by itself
constexpr size_t kUnit = 64 << 10;    // sizes and places are multiples of it
constexpr double kSlack = 1.25;       // resident over live, at the most

// One range of addresses, of which the kernel gives memory as it is touched. Blocks come from the smallest
// free extent that holds them, at its low end; neighbours that are free become one. Steps of training are
// alike, so extents find their way back into the same use.
class Arena {
 public:
  Arena() {
    const auto physical =
        static_cast<size_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(::sysconf(_SC_PAGE_SIZE));
    size_ = 4 * physical / kUnit * kUnit;  // addresses alone: room for what fragments
    void* place =
        ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (place == MAP_FAILED) {
      size_ = 0;
      return;
    }
    base_ = static_cast<char*>(place);
    ::madvise(base_, size_, MADV_HUGEPAGE);  // where it is refused, small pages do
  }

  // Not where the system grants no such range (ulimit -v, vm.overcommit_memory 2).
  bool is_there() const { return base_ != nullptr; }

  void* take(size_t bytes) {
    const size_t size = (bytes + kUnit - 1) / kUnit * kUnit;
    const std::lock_guard lock(mutex_);
    size_t offset = 0;
    const auto found = by_size_.lower_bound({size, 0});
    if (found != by_size_.end()) {
      offset = found->second;
      const Extent extent = remove(offset);
      if (extent.size > size) insert(offset + size, {extent.size - size, extent.resident});
    } else {
      // The last extent grows upwards, if it lies at the top.
      if (!free_.empty() && free_.rbegin()->first + free_.rbegin()->second.size == top_) {
        offset = free_.rbegin()->first;
        remove(offset);
      } else {
        offset = top_;
      }
      CALDERA_CHECK(offset + size <= size_, Error,
                    "out of memory: {} bytes for one tensor, {} bytes are in use. Take fewer tokens a "
                    "micro-batch, or recompute blocks (gradient_checkpointing)",
                    bytes, live_);
      top_ = offset + size;
    }
    sizes_[offset] = size;
    live_ += size;
    peak_ = std::max(peak_, live_);
    if (static_cast<double>(top_ - released_) > kSlack * static_cast<double>(peak_)) release_idle();
    return base_ + offset;
  }

  // False where the block is not one of these.
  bool give_back(void* block) {
    char* const place = static_cast<char*>(block);
    if (place < base_ || place >= base_ + size_) return false;
    const std::lock_guard lock(mutex_);
    const auto found = sizes_.find(static_cast<size_t>(place - base_));
    size_t offset = found->first;
    Extent extent{found->second, true};
    sizes_.erase(found);
    live_ -= extent.size;
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + extent.size) extent.size += remove(next->first).size;
    next = free_.lower_bound(offset);
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second.size == offset) {
        offset = before->first;
        extent.size += remove(offset).size;
      }
    }
    insert(offset, extent);
    return true;
  }

  CpuMemory state() {
    const std::lock_guard lock(mutex_);
    return {static_cast<int64_t>(live_), static_cast<int64_t>(top_ - released_ - live_),
            static_cast<int64_t>(peak_)};
  }

 private:
  struct Extent {
    size_t size;
    bool resident;  // some of it
  };

  void insert(size_t offset, const Extent& extent) {
    free_[offset] = extent;
    by_size_.insert({extent.size, offset});
    if (!extent.resident) released_ += extent.size;
  }
  Extent remove(size_t offset) {
    const auto found = free_.find(offset);
    const Extent extent = found->second;
    by_size_.erase({extent.size, offset});
    free_.erase(found);
    if (!extent.resident) released_ -= extent.size;
    return extent;
  }
  // Gives the pages of all free extents back to the system.
  void release_idle() {
    for (auto& [offset, extent] : free_) {
      if (!extent.resident) continue;
      ::madvise(base_ + offset, extent.size, MADV_DONTNEED);
      extent.resident = false;
      released_ += extent.size;
    }
  }

  std::mutex mutex_;
  char* base_ = nullptr;
  size_t size_ = 0, top_ = 0;  // addresses; used so far
  std::map<size_t, Extent> free_;
  std::set<std::pair<size_t, size_t>> by_size_;  // (size, offset) of each
  std::unordered_map<size_t, size_t> sizes_;     // of the blocks in use, by offset
  size_t live_ = 0, peak_ = 0, released_ = 0;
};

// Never destroyed: tensors in static storage outlive everything.
Arena& arena() {
  static Arena* const instance = new Arena();
  return *instance;
}

void free_large(void* block) { arena().give_back(block); }
void free_small(void* block) { c10::free_cpu(block); }
// For those who keep the address alone (oneDNN's work space).
void free_any(void* block) {
  if (!arena().give_back(block)) c10::free_cpu(block);
}

class CachingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kSmall || !arena().is_there()) {
      void* block = c10::alloc_cpu(bytes);
      return {block, block, &free_small, c10::Device(c10::kCPU)};
    }
    void* block = arena().take(bytes);
    return {block, block, &free_large, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_any; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

void use_caching_cpu_allocator() {
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  static CachingAllocator* const allocator = new CachingAllocator();
  c10::SetCPUAllocator(allocator, /*priority=*/100);
#endif
}

CpuMemory cpu_memory() { return arena().state(); }

}  // namespace caldera
