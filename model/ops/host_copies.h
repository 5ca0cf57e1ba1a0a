// Tensors of a forward pass that wait for its backward pass in host memory.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace caldera {

// Of one forward pass, in whose backward they are taken in the opposite order. On a GPU the copies lie in pinned memory
// and go both ways on a stream of their own, beside the computation: taking one has the one put before it already on
// its way. On the CPU they are plain copies: the same path, which saves nothing.
class HostCopies {
 public:
  // Starts to copy; x may be let go of at once. -> the place to take it from.
  size_t put(const at::Tensor& x);
  // The tensor on its device again, bit for bit; work on the current stream finds it whole.
  at::Tensor take(size_t place);

 private:
  struct Copy {
    at::Device device;
    at::Tensor on_host, back;  // `back`: from when it is on its way until it is taken
    std::optional<c10::Event> arrived;
  };
  void fetch(Copy& copy);

  std::vector<Copy> copies_;
  std::optional<c10::Stream> stream_;
};

}  // namespace caldera
