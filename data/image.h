// Pictures as CLIPImageProcessor on PIL makes them.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/words.h"

namespace caldera {

// An RGB picture of 8 bits a channel, rows top to bottom, without padding.
struct Image {
  int64_t height = 0, width = 0;  // pixels
  std::vector<uint8_t> pixels;    // height * width * 3
};

// Decodes by content, not by name: JPEG, PNG, WebP, GIF (its first frame), BMP, TIFF. EXIF orientation is ignored and alpha dropped,
// as PIL's convert("RGB") does. Throws DataError "WHERE: what" for an unknown format, a truncated file, or
// more than 89 million pixels (read from the header, before decoding).
Image decode_image(std::string_view bytes, const std::string& where);
Image load_image(const std::filesystem::path& file);

// PIL's Image.resize(BICUBIC): antialiased, fixed-point, bit for bit.
Image resize_bicubic(const Image& image, int64_t height, int64_t width);

// Square pixels for a tower: `pad` or `square` (see words.h), resized to image_size -> uint8 [3, Y, X].
// Fill colour of padding: int(mean * 255), as LLaVA's expand2square.
at::Tensor preprocess_image(const Image& image, const ImageSpec& spec, const std::string& image_aspect_ratio);

}  // namespace caldera
