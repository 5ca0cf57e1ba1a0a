// State that is written while training goes on.
#pragma once
#include <c10/core/Stream.h>

#include <mutex>
#include <optional>
#include <vector>

#include "model/weights/safetensors.h"
#include "train/optimizer.h"

namespace caldera {

// Tensors as they are now, read one after the other beside the work that goes on. Until the next update nobody
// changes them, and one at a time is copied as it is read; what is left by then is copied at once. On a GPU they
// are read on a stream of their own, beside the computation.
class Snapshot {
 public:
  // `may_change`: somebody will change the tensors, after copy_the_rest().
  Snapshot(StateList state, bool may_change);
  // All of them, each to be read once, from any one thread, while this Snapshot lives.
  const std::vector<TensorToWrite>& tensors() const { return tensors_; }
  // Copies what was not read, to host memory.
  void copy_the_rest();

 private:
  at::Tensor read(size_t i);

  std::vector<TensorToWrite> tensors_;
  std::mutex mutex_;  // of what follows
  StateList state_;   // what was not read
  bool may_change_;
  std::optional<c10::Stream> stream_;  // of the reader, on a GPU
};

}  // namespace caldera
