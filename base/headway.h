// Headway: long work tells whoever watches over it that it is not stuck. The watcher owns a counter, the work
// goes on under a scope that names it, and what takes long (reading, writing, hashing) counts it up as it
// gets on.
#pragma once
#include <atomic>
#include <cstdint>

namespace caldera {

// Counts the calling thread's counter up by one; nothing, for one comparison, where no scope names one.
void note_headway();

// The counter of the calling thread's innermost scope, to hand it on to a thread that works for it. nullptr:
// none.
std::atomic<int64_t>* headway_counter();

// While it lives, the calling thread's headway goes to this counter, which must outlive the scope; then to
// the one before. It begins and ends on the same thread.
class HeadwayScope {
 public:
  explicit HeadwayScope(std::atomic<int64_t>& counter) : HeadwayScope(&counter) {}
  explicit HeadwayScope(std::atomic<int64_t>* counter);  // nullptr: headway is not counted
  ~HeadwayScope();
  HeadwayScope(const HeadwayScope&) = delete;
  HeadwayScope& operator=(const HeadwayScope&) = delete;

 private:
  std::atomic<int64_t>* before_;
};

}  // namespace caldera
