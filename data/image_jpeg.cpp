#include "data/image_jpeg.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>  // jpeglib.h wants it

#include <jpeglib.h>

#include "base/error.h"

namespace caldera {
namespace {

// A progressive picture is gone over once a scan, and an empty scan takes a few bytes: half a megabyte could
// ask for minutes. Encoders write about ten scans.
constexpr int kMaxScans = 100;

// libjpeg's handler of errors must not return: it jumps back to where decoding began.
struct Errors {
  jpeg_error_mgr handler;  // first: libjpeg knows this part alone
  std::jmp_buf start;
  bool has_many_scans;
};

void jump_back(j_common_ptr decoder) { std::longjmp(reinterpret_cast<Errors*>(decoder->err)->start, 1); }
void say_nothing(j_common_ptr) {}
void stop_after_many_scans(j_common_ptr decoder) {
  if (reinterpret_cast<j_decompress_ptr>(decoder)->input_scan_number <= kMaxScans) return;
  reinterpret_cast<Errors*>(decoder->err)->has_many_scans = true;
  jump_back(decoder);
}

// a * b / 255, rounded, for bytes: PIL's MULDIV255.
int scale_255(int a, int b) {
  const int product = a * b + 128;
  return (product + (product >> 8)) >> 8;
}

// PIL takes the inks of every CMYK picture for inverted, as Adobe writes them.
void inks_to_rgb(const uint8_t* inks, int64_t width, uint8_t* rgb) {
  for (int64_t x = 0; x < width; ++x) {
    const int light = inks[4 * x + 3];
    for (int64_t c = 0; c < 3; ++c)
      rgb[3 * x + c] = static_cast<uint8_t>(std::max(light - scale_255(255 - inks[4 * x + c], light), 0));
  }
}

// False where libjpeg finds an error, or another size than image's. Nothing here has a destructor that a jump
// would leave out.
bool decode(jpeg_decompress_struct& decoder, Errors& errors, jpeg_progress_mgr& progress,
            std::string_view bytes, Image& image) {
  decoder.err = jpeg_std_error(&errors.handler);
  errors.handler.error_exit = jump_back;
  errors.handler.output_message = say_nothing;
  if (setjmp(errors.start) != 0) return false;
  jpeg_create_decompress(&decoder);
  progress.progress_monitor = stop_after_many_scans;
  decoder.progress = &progress;  // after creation, which clears it
  jpeg_mem_src(&decoder, reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  jpeg_read_header(&decoder, TRUE);
  if (decoder.image_height != image.height || decoder.image_width != image.width) return false;
  const bool has_inks = decoder.num_components == 4;
  decoder.out_color_space = has_inks ? JCS_CMYK : JCS_RGB;
  jpeg_start_decompress(&decoder);
  JSAMPARRAY inks = nullptr;
  if (has_inks)
    inks = decoder.mem->alloc_sarray(reinterpret_cast<j_common_ptr>(&decoder), JPOOL_IMAGE,
                                     decoder.image_width * 4, 1);
  while (decoder.output_scanline < decoder.image_height) {
    uint8_t* row = image.pixels.data() + int64_t{decoder.output_scanline} * image.width * 3;
    jpeg_read_scanlines(&decoder, has_inks ? inks : &row, 1);
    if (has_inks) inks_to_rgb(inks[0], image.width, row);
  }
  jpeg_finish_decompress(&decoder);
  return true;
}

}  // namespace

Image decode_jpeg(std::string_view bytes, const ImageHeader& header, const std::string& where) {
  Image image{header.height, header.width, Pixels(static_cast<size_t>(header.height * header.width * 3))};
  jpeg_decompress_struct decoder{};
  Errors errors{};
  jpeg_progress_mgr progress{};
  const bool is_whole = decode(decoder, errors, progress, bytes, image);
  jpeg_destroy_decompress(&decoder);
  CALDERA_CHECK(!errors.has_many_scans, DataError,
                "{}: a JPEG of more than {} scans, each of which goes over the whole picture; save the "
                "picture anew or drop the record",
                where, kMaxScans);
  CALDERA_CHECK(is_whole, DataError,
                "{}: the picture's data is broken and cannot be decoded; replace the file or drop the record",
                where);
  return image;
}

}  // namespace caldera
