// Pictures as CLIPImageProcessor on PIL makes them.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/words.h"

namespace caldera {

// Leaves what a vector grows by as it is, for a decoder to write.
template <class T>
struct Uninitialized : std::allocator<T> {
  template <class U>
  struct rebind {
    using other = Uninitialized<U>;
  };
  template <class U>
  void construct(U* place) {
    ::new (static_cast<void*>(place)) U;
  }
  template <class U, class... Values>
  void construct(U* place, Values&&... values) {
    ::new (static_cast<void*>(place)) U(std::forward<Values>(values)...);
  }
};
using Pixels = std::vector<uint8_t, Uninitialized<uint8_t>>;

// An RGB picture of 8 bits a channel, rows top to bottom, without padding.
struct Image {
  int64_t height = 0, width = 0;  // pixels
  Pixels pixels;                  // height * width * 3
};

// Decodes by content, not by name: JPEG, PNG, WebP and GIF (of an animated one the first frame), BMP, TIFF. EXIF orientation is
// ignored and alpha dropped, as PIL's convert("RGB") does. Throws DataError "WHERE: what" for an unknown
// format, a truncated file, or more than 89 million pixels (read from the header, before decoding).
Image decode_image(std::string_view bytes, const std::string& where);
Image load_image(const std::filesystem::path& file);

// Square pixels for a tower: `pad` or `square` (see words.h), resized to image_size -> uint8 [3, Y, X].
// Fill colour of padding: int(mean * 255), as LLaVA's expand2square.
at::Tensor preprocess_image(const Image& image, const ImageSpec& spec, const std::string& image_aspect_ratio);

}  // namespace caldera
