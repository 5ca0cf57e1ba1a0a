// PIL's Image.resize(BICUBIC): antialiased, in fixed point, bit for bit.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>

#include "data/image.h"

namespace caldera {

// What is resized: a picture within a larger one of one colour, which is never made.
struct Frame {
  int64_t height = 0, width = 0;  // pixels, of the whole
  int64_t top = 0, left = 0;      // where the picture lies in it
  std::array<uint8_t, 3> colour{};
};

// Rows and columns of the resized picture that are wanted.
struct Window {
  int64_t top = 0, left = 0, height = 0, width = 0;  // pixels
};

// That window of the frame resized to height x width -> uint8 [3, window.height, window.width]. Where Pillow
// begins with the vertical pass (see is_vertical_first), the frame may not be higher than its picture; a
// square that becomes a square is never such a case.
at::Tensor resize_bicubic(const Image& image, const Frame& frame, int64_t height, int64_t width,
                          const Window& window);

}  // namespace caldera
