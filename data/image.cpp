#include "data/image.h"

#include <algorithm>
#include <opencv2/core.hpp>
#include <opencv2/core/utils/logger.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

#include "base/aten.h"
#include "base/error.h"
#include "base/files.h"
#include "data/gif.h"
#include "data/image_format.h"
#include "data/image_jpeg.h"
#include "data/image_png.h"
#include "data/resize.h"
#include "data/webp.h"

namespace caldera {
namespace {

// Once a process. Pictures are decoded side by side in the loader's threads, with which OpenCV's own would
// compete; and what is wrong with a picture is said by the error thrown, not on a stream.
void quieten_opencv() {
  [[maybe_unused]] static const bool done = [] {
    cv::setNumThreads(0);
    cv::utils::logging::setLogLevel(cv::utils::logging::LOG_LEVEL_SILENT);
    return true;
  }();
}

// expand2square of LLaVA's mm_utils.py.
Frame square_around(const Image& image, const std::array<float, 3>& mean) {
  const int64_t side = std::max(image.height, image.width);
  Frame frame{side, side, (side - image.height) / 2, (side - image.width) / 2};
  for (size_t c = 0; c < 3; ++c) frame.colour[c] = static_cast<uint8_t>(static_cast<double>(mean[c]) * 255);
  return frame;
}

// As PIL shows it: what the frame does not cover is black.
Image decode_animated_webp(std::string_view bytes, const ImageHeader& header, const std::string& where) {
  const WebpFrame frame = first_webp_frame(bytes, header.height, header.width, where);
  Image part = decode_image(frame.still, where);
  CALDERA_CHECK(part.height == frame.height && part.width == frame.width, DataError,
                "{}: the picture's data is broken and cannot be decoded; replace the file or drop the record",
                where);
  if (part.height == header.height && part.width == header.width) return part;
  Image image{header.height, header.width, {}};
  image.pixels.resize(static_cast<size_t>(header.height * header.width * 3), 0);
  for (int64_t y = 0; y < part.height; ++y) {
    const auto row = part.pixels.begin() + y * part.width * 3;
    std::copy(row, row + part.width * 3,
              image.pixels.begin() + ((frame.top + y) * image.width + frame.left) * 3);
  }
  return image;
}

}  // namespace

Image decode_image(std::string_view bytes, const std::string& where) {
  quieten_opencv();
  const ImageHeader header = probe_image(bytes, where);
  if (header.format == ImageFormat::kJpeg) return decode_jpeg(bytes, header, where);
  if (header.format == ImageFormat::kPng) return decode_png(bytes, header, where);
  if (header.format == ImageFormat::kGif) return decode_gif(bytes, where);
  if (header.is_animated) return decode_animated_webp(bytes, header, where);
  CALDERA_CHECK(bytes.size() <= INT_MAX, DataError, "{}: a picture file of {} bytes", where, bytes.size());
  // PIL clips 16-bit grey at 255 where OpenCV would take the high byte. And it drops the alpha of a TIFF, by
  // which OpenCV multiplies: only an opaque one is the same to both.
  const bool is_gray16 = header.is_gray && header.bits_per_sample == 16;
  const bool is_raw = header.has_alpha && header.bits_per_sample == 8;
  const int flags = is_gray16 ? cv::IMREAD_GRAYSCALE | cv::IMREAD_ANYDEPTH | cv::IMREAD_IGNORE_ORIENTATION
                    : is_raw  ? cv::IMREAD_UNCHANGED
                              : cv::IMREAD_COLOR | cv::IMREAD_IGNORE_ORIENTATION;
  cv::Mat decoded;
  try {
    const cv::Mat encoded(1, static_cast<int>(bytes.size()), CV_8UC1, const_cast<char*>(bytes.data()));
    decoded = cv::imdecode(encoded, flags);
  } catch (const cv::Exception& error) {
    throw DataError(fmt::format("{}: the picture cannot be decoded: {}", where, error.what()));
  }
  CALDERA_CHECK(decoded.rows == header.height && decoded.cols == header.width, DataError,
                "{}: the picture's data is broken and cannot be decoded; replace the file or drop the record",
                where);
  if (is_raw) {
    cv::Mat alpha;
    cv::extractChannel(decoded, alpha, 3);
    CALDERA_CHECK(cv::countNonZero(alpha == 255) == static_cast<int>(decoded.total()), DataError,
                  "{}: a TIFF with transparent parts; convert it to PNG", where);
  }
  Image image{header.height, header.width, Pixels(decoded.total() * 3)};
  cv::Mat rgb(decoded.rows, decoded.cols, CV_8UC3, image.pixels.data());
  if (is_gray16) {
    cv::Mat clipped;
    decoded.convertTo(clipped, CV_8U);  // saturates
    cv::cvtColor(clipped, rgb, cv::COLOR_GRAY2RGB);
  } else {
    cv::cvtColor(decoded, rgb, decoded.channels() == 4 ? cv::COLOR_BGRA2RGB : cv::COLOR_BGR2RGB);
  }
  return image;
}

Image load_image(const std::filesystem::path& file) {
  std::string bytes;
  try {
    bytes = read_file(file);
  } catch (const Error& error) {
    throw DataError(error.what());
  }
  return decode_image(bytes, file.string());
}

at::Tensor preprocess_image(const Image& image, const ImageSpec& spec,
                            const std::string& image_aspect_ratio) {
  CALDERA_CHECK(image_aspect_ratio == kAspectPad || image_aspect_ratio == kAspectSquare, ConfigError,
                "image_aspect_ratio: expected \"{}\" or \"{}\", got \"{}\"", kAspectSquare, kAspectPad,
                image_aspect_ratio);
  const int64_t size = spec.image_size;
  const Frame frame = image_aspect_ratio == kAspectPad ? square_around(image, spec.image_mean)
                                                       : Frame{image.height, image.width};
  // SiglipImageProcessor: both edges become `size`. CLIPImageProcessor: the shorter edge does, the longer one
  // int(size * long / short); then the centre.
  if (!spec.keeps_aspect) return resize_bicubic(image, frame, size, size, {0, 0, size, size});
  const int64_t shorter = std::min(frame.height, frame.width), longer = std::max(frame.height, frame.width);
  const auto scaled = static_cast<int64_t>(static_cast<double>(size * longer) / static_cast<double>(shorter));
  const int64_t height = frame.height <= frame.width ? size : scaled;
  const int64_t width = frame.height <= frame.width ? scaled : size;
  return resize_bicubic(image, frame, height, width, {(height - size) / 2, (width - size) / 2, size, size});
}

}  // namespace caldera
