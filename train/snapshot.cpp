#include "train/snapshot.h"

#include <c10/core/StreamGuard.h>

#include <algorithm>
#include <utility>

#include "model/ops/streams.h"

namespace caldera {
namespace {

// In host memory, and nobody else's.
at::Tensor copy_of(const Master& state) {
  const at::NoGradGuard no_grad;
  const at::Tensor values = state.values();
  return values.is_alias_of(state.weight) && values.is_cpu() ? values.clone() : values.cpu();
}

}  // namespace

Snapshot::Snapshot(StateList state, bool may_change) : state_(std::move(state)), may_change_(may_change) {
  for (size_t i = 0; i < state_.size(); ++i) {
    const auto& [name, tensor] = state_[i];
    tensors_.push_back({name, tensor.weight.sizes().vec(), tensor.values_type(), [this, i] { return read(i); }});
  }
  const auto on_gpu = std::find_if(state_.begin(), state_.end(),
                                   [](const auto& item) { return !item.second.weight.is_cpu(); });
  if (!may_change || on_gpu == state_.end()) return;
  const at::Device device = on_gpu->second.weight.device();
  static const c10::Stream stream = pool_stream(device);  // a process works on one GPU
  follow(stream, current_stream(device));
  stream_ = stream;
}

at::Tensor Snapshot::read(size_t i) {
  const std::lock_guard lock(mutex_);
  const c10::OptionalStreamGuard guard(stream_);
  const Master state = std::exchange(state_[i].second, {});
  return may_change_ ? copy_of(state) : state.values();
}

void Snapshot::copy_the_rest() {
  const std::lock_guard lock(mutex_);
  if (!may_change_) return;
  for (auto& [name, state] : state_)
    if (state.weight.defined()) state = {copy_of(state), {}};
  may_change_ = false;
}

}  // namespace caldera
