// Streams of any GPU, through LibTorch's generic interface.
#pragma once
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "base/aten.h"

namespace caldera {

inline c10::Stream current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}
// One beside the computation's.
inline c10::Stream pool_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
}
// What `second` is given from here on waits for what `first` has been given so far.
inline void follow(const c10::Stream& second, const c10::Stream& first) {
  c10::Event reached(first.device_type());
  reached.record(first);
  reached.block(second);
}

}  // namespace caldera
