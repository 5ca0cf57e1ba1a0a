#include "data/image_png.h"

#include <png.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <vector>

#include "base/error.h"

namespace caldera {
namespace {

struct PngSource {
  std::string_view bytes;
};

void read_png(png_structp png, png_bytep to, size_t num_bytes) {
  auto* source = static_cast<PngSource*>(png_get_io_ptr(png));
  if (num_bytes > source->bytes.size()) png_error(png, "");
  std::memcpy(to, source->bytes.data(), num_bytes);
  source->bytes.remove_prefix(num_bytes);
}

[[noreturn]] void stop_png(png_structp png, png_const_charp) { png_longjmp(png, 1); }
void pass_png_warning(png_structp, png_const_charp) {}

// Rows of `num_channels` samples, of 16 bits where the picture is grey with as many, else of 8. False where
// libpng finds an error. Nothing here has a destructor that a jump would leave out.
bool decode_rows(png_structp png, png_infop info, PngSource& source, const ImageHeader& header,
                 std::vector<png_bytep>& rows, size_t row_bytes) {
  if (setjmp(png_jmpbuf(png)) != 0) return false;
  png_set_read_fn(png, &source, read_png);
  png_read_info(png, info);
  if (static_cast<int64_t>(png_get_image_height(png, info)) != header.height ||
      static_cast<int64_t>(png_get_image_width(png, info)) != header.width)
    return false;
  png_set_expand(png);  // palettes and less than 8 bits; a transparent colour becomes alpha
  png_set_strip_alpha(png);
  if (!(header.is_gray && header.bits_per_sample == 16)) {
    png_set_strip_16(png);
    png_set_gray_to_rgb(png);
  }
  png_set_interlace_handling(png);
  png_read_update_info(png, info);
  if (png_get_rowbytes(png, info) != row_bytes) return false;
  png_read_image(png, rows.data());
  png_read_end(png, nullptr);
  return true;
}

}  // namespace

Image decode_png(std::string_view bytes, const ImageHeader& header, const std::string& where) {
  const bool is_gray16 = header.is_gray && header.bits_per_sample == 16;
  const auto width = static_cast<size_t>(header.width), height = static_cast<size_t>(header.height);
  const size_t row_bytes = width * (is_gray16 ? 2 : 3);
  Image image{header.height, header.width, Pixels(width * height * 3)};
  Pixels wide(is_gray16 ? row_bytes * height : 0);
  std::vector<png_bytep> rows;
  for (size_t y = 0; y < height; ++y)
    rows.push_back((is_gray16 ? wide : image.pixels).data() + y * row_bytes);

  PngSource source{bytes};
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, stop_png, pass_png_warning);
  CALDERA_CHECK(png != nullptr, Error, "libpng cannot be used: another version than {} is loaded",
                PNG_LIBPNG_VER_STRING);
  png_infop info = png_create_info_struct(png);
  const bool is_whole = info != nullptr && decode_rows(png, info, source, header, rows, row_bytes);
  png_destroy_read_struct(&png, &info, nullptr);
  CALDERA_CHECK(is_whole, DataError,
                "{}: the picture's data is broken and cannot be decoded; replace the file or drop the record",
                where);
  for (size_t i = 0; 2 * i < wide.size(); ++i) {
    const int value = wide[2 * i] << 8 | wide[2 * i + 1];
    std::fill_n(image.pixels.begin() + static_cast<std::ptrdiff_t>(3 * i), 3,
                static_cast<uint8_t>(std::min(value, 255)));
  }
  return image;
}

}  // namespace caldera
