// The window that a centre crop keeps of a resized picture, without computing the rest.
#pragma once
#include <cstdint>

#include "data/image.h"

namespace caldera {

// Rows and columns of the resized picture that are wanted.
struct Window {
  int64_t top = 0, left = 0, height = 0, width = 0;  // pixels
};

// That window of resize_bicubic(image, height, width).
Image resize_bicubic_window(const Image& image, int64_t height, int64_t width, const Window& window);

}  // namespace caldera
