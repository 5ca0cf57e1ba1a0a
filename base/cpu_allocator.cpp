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
constexpr double kSlack = 1.25;       // resident over the most that was live since settle(), at the most

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
      const size_t extent = remove(offset);
      if (extent > size) insert(offset + size, extent - size);
    } else {
      // The last extent grows upwards, if it lies at the top.
      const bool is_free_at_top = !free_.empty() && free_.rbegin()->first + free_.rbegin()->second == top_;
      offset = is_free_at_top ? free_.rbegin()->first : top_;
      CALDERA_CHECK(offset + size <= size_, Error,
                    "out of memory: {} bytes for one tensor, {} bytes are in use. Take fewer tokens a "
                    "micro-batch, or recompute blocks (gradient_checkpointing)",
                    bytes, live_);
      if (is_free_at_top) remove(offset);
      top_ = offset + size;
    }
    mark_resident(offset, offset + size);
    sizes_[offset] = size;
    live_ += size;
    peak_ = std::max(peak_, live_);
    high_ = std::max(high_, live_);
    release_idle_above(high_);
    return base_ + offset;
  }

  void settle() {
    const std::lock_guard lock(mutex_);
    high_ = live_;
    release_idle_above(high_);
  }

  // False where the block is not one of these.
  bool give_back(void* block) {
    char* const place = static_cast<char*>(block);
    if (place < base_ || place >= base_ + size_) return false;
    const std::lock_guard lock(mutex_);
    const auto found = sizes_.find(static_cast<size_t>(place - base_));
    size_t offset = found->first, size = found->second;
    sizes_.erase(found);
    live_ -= size;
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && next->first == offset + size) size += remove(next->first);
    next = free_.lower_bound(offset);
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        offset = before->first;
        size += remove(offset);
      }
    }
    insert(offset, size);
    return true;
  }

  CpuMemory state() {
    const std::lock_guard lock(mutex_);
    return {static_cast<int64_t>(live_), static_cast<int64_t>(top_ - released_ - live_),
            static_cast<int64_t>(peak_)};
  }

 private:
  void insert(size_t offset, size_t size) {
    free_[offset] = size;
    by_size_.insert({size, offset});
  }
  // Returns the size.
  size_t remove(size_t offset) {
    const auto found = free_.find(offset);
    const size_t size = found->second;
    by_size_.erase({size, offset});
    free_.erase(found);
    return size;
  }
  // [begin, end) is about to be touched.
  void mark_resident(size_t begin, size_t end) {
    auto range = holes_.lower_bound(begin);
    if (range != holes_.begin() && std::prev(range)->second > begin) --range;
    while (range != holes_.end() && range->first < end) {
      const auto [hole_begin, hole_end] = *range;
      range = holes_.erase(range);
      released_ -= std::min(end, hole_end) - std::max(begin, hole_begin);
      if (hole_begin < begin) holes_[hole_begin] = begin;
      if (hole_end > end) holes_[end] = hole_end;
    }
  }
  // Gives the pages of all free extents back to the system where there are too many for `live` bytes.
  void release_idle_above(size_t live) {
    if (static_cast<double>(top_ - released_) <= kSlack * static_cast<double>(live)) return;
    for (const auto& [offset, size] : free_) {
      mark_resident(offset, offset + size);  // what was released before becomes one with the rest
      ::madvise(base_ + offset, size, MADV_DONTNEED);
      holes_[offset] = offset + size;
      released_ += size;
    }
  }

  std::mutex mutex_;
  char* base_ = nullptr;
  size_t size_ = 0, top_ = 0;  // addresses; used so far
  std::map<size_t, size_t> free_;   // sizes by offset
  std::map<size_t, size_t> holes_;  // where nothing is resident, parts of free extents: ends by begin
  std::set<std::pair<size_t, size_t>> by_size_;  // (size, offset) of each
  std::unordered_map<size_t, size_t> sizes_;     // of the blocks in use, by offset
  size_t live_ = 0, released_ = 0;
  size_t peak_ = 0, high_ = 0;  // the most that was live, ever and since settle()
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

void settle_cpu_memory() { arena().settle(); }

CpuMemory cpu_memory() { return arena().state(); }

}  // namespace caldera
