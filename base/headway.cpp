#include "base/headway.h"

#include <utility>

namespace caldera {
namespace {
thread_local std::atomic<int64_t>* t_headway = nullptr;
}

void note_headway() {
  if (t_headway != nullptr) t_headway->fetch_add(1, std::memory_order_relaxed);
}

std::atomic<int64_t>* headway_counter() { return t_headway; }

HeadwayScope::HeadwayScope(std::atomic<int64_t>* counter) : before_(std::exchange(t_headway, counter)) {}
HeadwayScope::~HeadwayScope() { t_headway = before_; }

}  // namespace caldera
