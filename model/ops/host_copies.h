// Tensors of a forward pass that wait for its backward pass in host memory.
#pragma once
#include <c10/core/Event.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "base/aten.h"

namespace caldera {

// Of one forward pass, in whose backward they are taken once each, in the opposite order. On a GPU the copies lie in pinned
// memory and go both ways on a stream of their own, beside the computation: taking one has the one put before it already on
// its way. Of the GPU's memory one tensor is held on its way out, and one on its way back. On the CPU they are plain copies:
// the same path, which saves nothing.
class HostCopies {
 public:
  HostCopies() = default;
  ~HostCopies();
  HostCopies(const HostCopies&) = delete;
  HostCopies& operator=(const HostCopies&) = delete;

  // Starts to copy. x may be let go of at once, but nobody may write to it. -> the place to take it from.
  size_t put(const at::Tensor& x);
  // The tensor on its device again, bit for bit; work on the current stream finds it whole.
  at::Tensor take(size_t place);

 private:
  struct Copy {
    at::Device device;
    at::Tensor leaving, on_host, back;  // each until it has done its part
    std::optional<c10::Event> has_left, has_arrived;
  };
  static void let_go(Copy& copy);
  static void fetch(Copy& copy);

  std::vector<Copy> copies_;
};

}  // namespace caldera
