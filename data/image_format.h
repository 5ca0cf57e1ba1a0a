// What a picture file says of itself, read without decoding it.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace caldera {

// LLaVA's PIL warns of a decompression bomb at this many pixels (2 GB of RGBA / 24); larger pictures are
// refused.
inline constexpr int64_t kMaxImagePixels = 89'478'485;

enum class ImageFormat { kJpeg, kPng, kWebp, kBmp, kTiff, kGif };

struct ImageHeader {
  ImageFormat format = ImageFormat::kJpeg;
  int64_t height = 0, width = 0;  // pixels, EXIF orientation ignored
  int64_t bits_per_sample = 8;    // PNG and TIFF
  bool is_gray = false;           // PNG and TIFF: one channel, no alpha
  bool has_alpha = false;         // TIFF: four channels, one of them alpha
  bool is_animated = false;       // WebP
};

// Reads signature and size, and checks that the file is whole: JPEG up to its end marker (bytes after it are
// allowed, as PIL allows them), PNG up to IEND, GIF up to its first frame's end, the length that WebP and BMP
// state. Touches few pages of a mapped file. Throws DataError "WHERE: what" for an unknown format, a
// truncated file, more than kMaxImagePixels, or a TIFF whose orientation or samples are not supported.
ImageHeader probe_image(std::string_view bytes, const std::string& where);

}  // namespace caldera
