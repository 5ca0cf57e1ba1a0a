#include "model/ops/host_copies.h"

#include <c10/core/StreamGuard.h>

#include "base/error.h"
#include "model/ops/streams.h"

namespace caldera {
namespace {

// All copies of a process go on one stream: a process works on one GPU.
c10::Stream copy_stream(at::Device device) {
  static const c10::Stream stream = pool_stream(device);
  CALDERA_ASSERT(stream.device() == device);
  return stream;
}

// `to` takes the values of `from` on the copies' stream. Both belong to the current stream, whose later work may use them
// once it has waited for the event: then the allocator need not watch a second stream, which would hold on to
// memory until the host looks.
c10::Event copy_beside(const at::Tensor& to, const at::Tensor& from, at::Device device) {
  const c10::Stream stream = copy_stream(device);
  follow(stream, current_stream(device));
  const c10::StreamGuard guard(stream);
  to.copy_(from, /*non_blocking=*/true);
  c10::Event done(device.type());
  done.record(stream);
  return done;
}

}  // namespace

HostCopies::~HostCopies() {
  // What was never taken: its memory goes back once the copies are through with it.
  try {
    for (Copy& copy : copies_) {
      let_go(copy);
      if (copy.back.defined() && copy.has_arrived) copy.has_arrived->block(current_stream(copy.device));
    }
  } catch (const std::exception&) {  // of a GPU that failed: the error that led here says so
  }
}

void HostCopies::let_go(Copy& copy) {
  if (!copy.leaving.defined()) return;
  copy.has_left->block(current_stream(copy.device));
  copy.leaving.reset();
}

size_t HostCopies::put(const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  if (!copies_.empty()) let_go(copies_.back());
  Copy& copy = copies_.emplace_back(Copy{.device = x.device()});
  if (x.is_cpu()) {
    copy.on_host = x.detach().clone();
  } else {
    copy.leaving = x.detach();
    copy.on_host = at::empty(x.sizes(), x.options().device(at::kCPU).pinned_memory(true).requires_grad(false));
    copy.has_left = copy_beside(copy.on_host, copy.leaving, copy.device);
  }
  return copies_.size() - 1;
}

void HostCopies::fetch(Copy& copy) {
  if (copy.back.defined()) return;
  CALDERA_ASSERT(copy.on_host.defined());  // taken once
  let_go(copy);
  const at::Tensor on_host = std::exchange(copy.on_host, at::Tensor());
  if (copy.device.is_cpu()) {
    copy.back = on_host;
  } else {
    copy.back = at::empty(on_host.sizes(), on_host.options().device(copy.device).pinned_memory(false));
    copy.has_arrived = copy_beside(copy.back, on_host, copy.device);  // the allocator waits for it before it reuses on_host
  }
}

at::Tensor HostCopies::take(size_t place) {
  CALDERA_ASSERT(place < copies_.size());
  const at::NoGradGuard no_grad;
  Copy& copy = copies_[place];
  fetch(copy);
  if (copy.has_arrived) copy.has_arrived->block(current_stream(copy.device));
  if (place > 0) fetch(copies_[place - 1]);
  return std::exchange(copy.back, at::Tensor());
}

}  // namespace caldera
