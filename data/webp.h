// The first frame of an animated WebP, which OpenCV does not read: as a still one.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace caldera {

struct WebpFrame {
  int64_t top = 0, left = 0, height = 0, width = 0;  // on the picture, in pixels
  std::string still;                                 // a WebP file of the frame alone
};

// `height` and `width` are the picture's. Throws DataError "WHERE: ..." where the frame's data are cut off,
// reach beyond the picture, or are missing.
WebpFrame first_webp_frame(std::string_view bytes, int64_t height, int64_t width, const std::string& where);

}  // namespace caldera
