#include "model/ops/host_copies.h"

#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/error.h"

namespace caldera {
namespace {

using Streams = c10::impl::VirtualGuardImpl;  // of whichever device it is

// What is given to `second` from here on waits for what `first` has been given so far.
void follow(const c10::Stream& second, const c10::Stream& first) {
  c10::Event reached(first.device_type());
  reached.record(first);
  reached.block(second);
}

}  // namespace

size_t HostCopies::put(const at::Tensor& x) {
  const at::NoGradGuard no_grad;
  Copy& copy = copies_.emplace_back(Copy{.device = x.device(), .on_host = {}, .back = {}, .arrived = {}});
  if (x.is_cpu()) {
    copy.on_host = x.detach().clone();
  } else {
    const Streams streams(x.device().type());
    if (!stream_) stream_ = streams.getStreamFromGlobalPool(x.device());
    follow(*stream_, streams.getStream(x.device()));
    const c10::StreamGuard guard(*stream_);
    copy.on_host = at::empty(x.sizes(), x.options().device(at::kCPU).pinned_memory(true).requires_grad(false));
    copy.on_host.copy_(x, /*non_blocking=*/true);
    x.record_stream(*stream_);  // its memory stays until it is read
  }
  return copies_.size() - 1;
}

void HostCopies::fetch(Copy& copy) {
  if (copy.back.defined()) return;
  if (copy.device.is_cpu()) {
    copy.back = copy.on_host;
    return;
  }
  const Streams streams(copy.device.type());
  copy.back = at::empty(copy.on_host.sizes(), copy.on_host.options().device(copy.device).pinned_memory(false));
  follow(*stream_, streams.getStream(copy.device));  // the memory may have been another tensor's until here
  const c10::StreamGuard guard(*stream_);
  copy.back.copy_(copy.on_host, /*non_blocking=*/true);
  copy.back.record_stream(*stream_);
  copy.arrived.emplace(copy.device.type());
  copy.arrived->record(*stream_);
}

at::Tensor HostCopies::take(size_t place) {
  CALDERA_ASSERT(place < copies_.size());
  const at::NoGradGuard no_grad;
  Copy& copy = copies_[place];
  fetch(copy);
  if (copy.arrived) copy.arrived->block(Streams(copy.device.type()).getStream(copy.device));
  if (place > 0) fetch(copies_[place - 1]);
  return std::move(copy.back);
}

}  // namespace caldera
