#include "data/image.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <opencv2/core.hpp>
#include <opencv2/core/utils/logger.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

#include "base/error.h"
#include "base/files.h"
#include "data/gif.h"
#include "data/image_format.h"
#include "data/resize.h"

namespace caldera {
namespace {

constexpr int64_t kChannels = 3;

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
Image pad_to_square(const Image& image, const std::array<float, 3>& mean) {
  const int64_t side = std::max(image.height, image.width);
  const int64_t top = (side - image.height) / 2, left = (side - image.width) / 2;
  Image square{side, side, {}};
  square.pixels.resize(static_cast<size_t>(side * side * kChannels));
  const auto row = static_cast<size_t>(side * kChannels);
  for (size_t i = 0; i < row; ++i) {
    square.pixels[i] = static_cast<uint8_t>(static_cast<double>(mean[i % 3]) * 255);
  }
  for (size_t filled = row; filled < square.pixels.size(); filled += row) {
    std::copy_n(square.pixels.begin(), row, square.pixels.begin() + static_cast<std::ptrdiff_t>(filled));
  }
  for (int64_t y = 0; y < image.height; ++y) {
    std::copy_n(image.pixels.begin() + y * image.width * kChannels, image.width * kChannels,
                square.pixels.begin() + ((top + y) * side + left) * kChannels);
  }
  return square;
}

// CLIPImageProcessor: the shorter edge becomes `size`, the longer one int(size * long / short); then the
// centre. SiglipImageProcessor: both edges become `size`.
Image resize_to_square(const Image& image, int64_t size, bool keeps_aspect) {
  if (!keeps_aspect) return resize_bicubic(image, size, size);
  const int64_t shorter = std::min(image.height, image.width), longer = std::max(image.height, image.width);
  const auto scaled = static_cast<int64_t>(static_cast<double>(size * longer) / static_cast<double>(shorter));
  const int64_t height = image.height <= image.width ? size : scaled;
  const int64_t width = image.height <= image.width ? scaled : size;
  return resize_bicubic_window(image, height, width, {(height - size) / 2, (width - size) / 2, size, size});
}

}  // namespace

Image decode_image(std::string_view bytes, const std::string& where) {
  quieten_opencv();
  const ImageHeader header = probe_image(bytes, where);
  if (header.format == ImageFormat::kGif) return decode_gif(bytes, where);
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
  Image image{header.height, header.width, std::vector<uint8_t>(decoded.total() * 3)};
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
  const bool pad = image_aspect_ratio == kAspectPad && image.height != image.width;
  const Image square = resize_to_square(pad ? pad_to_square(image, spec.image_mean) : image, spec.image_size,
                                        spec.keeps_aspect);
  at::Tensor pixels_CYX = at::empty({kChannels, spec.image_size, spec.image_size}, at::kByte);
  auto* planes = pixels_CYX.data_ptr<uint8_t>();
  const auto plane_size = static_cast<size_t>(spec.image_size * spec.image_size);
  for (size_t i = 0; i < plane_size; ++i) {
    for (size_t c = 0; c < 3; ++c) planes[c * plane_size + i] = square.pixels[i * 3 + c];
  }
  return pixels_CYX;
}

}  // namespace caldera
