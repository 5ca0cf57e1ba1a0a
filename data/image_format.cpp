#include "data/image_format.h"

#include <cstring>

#include "base/error.h"
#include "data/gif.h"

namespace caldera {
namespace {

// Bounds-checked reads from a picture's bytes; every read past the end means a truncated file.
class HeaderReader {
 public:
  HeaderReader(std::string_view bytes, const std::string& where) : bytes_(bytes), where_(where) {}
  std::string_view bytes() const { return bytes_; }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()); }
  uint64_t big(int64_t offset, int num_bytes) const {
    uint64_t value = 0;
    for (int i = 0; i < num_bytes; ++i) value = value << 8 | byte(offset + i);
    return value;
  }
  uint64_t little(int64_t offset, int num_bytes) const {
    uint64_t value = 0;
    for (int i = num_bytes; i-- > 0;) value = value << 8 | byte(offset + i);
    return value;
  }
  bool matches(int64_t offset, std::string_view text) const {
    return offset >= 0 && offset <= size() && bytes_.substr(static_cast<size_t>(offset), text.size()) == text;
  }
  // Offset of the next such byte, or the end.
  int64_t find(int64_t offset, uint8_t value) const {
    if (offset >= size()) return size();
    const size_t found = bytes_.find(static_cast<char>(value), static_cast<size_t>(offset));
    return found == std::string_view::npos ? size() : static_cast<int64_t>(found);
  }
  [[noreturn]] void truncated() const {
    throw DataError(
        fmt::format("{}: the picture is truncated: it ends after {} bytes, before its data does; replace "
                    "the file or drop the record",
                    where_, size()));
  }

 private:
  uint8_t byte(int64_t offset) const {
    if (offset < 0 || offset >= size()) truncated();
    return static_cast<uint8_t>(bytes_[static_cast<size_t>(offset)]);
  }
  std::string_view bytes_;
  const std::string& where_;
};

// Entropy-coded data holds 0xFF only before 0x00 (stuffing) and RSTn; any other marker ends the scan.
int64_t end_of_scan(const HeaderReader& file, int64_t offset) {
  for (;;) {
    offset = file.find(offset, 0xFF);
    const uint64_t next = file.big(offset, 2) & 0xFF;
    if (next != 0 && !(next >= 0xD0 && next <= 0xD7) && next != 0xFF) return offset;
    offset += next == 0xFF ? 1 : 2;
  }
}

ImageHeader probe_jpeg(const HeaderReader& file, const std::string& where) {
  ImageHeader header;
  int64_t offset = 2;
  for (;;) {
    offset = file.find(offset, 0xFF);
    while (file.big(offset, 2) == 0xFFFF) ++offset;
    const uint64_t marker = file.big(offset, 2) & 0xFF;
    offset += 2;
    if (marker == 0xD9) break;  // end of image
    if (marker == 0x00 || marker == 0x01 || (marker >= 0xD0 && marker <= 0xD8))
      continue;  // no segment follows
    const auto length = static_cast<int64_t>(file.big(offset, 2));
    const bool is_frame =
        marker >= 0xC0 && marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC;
    if (is_frame) {
      header.height = static_cast<int64_t>(file.big(offset + 3, 2));
      header.width = static_cast<int64_t>(file.big(offset + 5, 2));
    }
    offset += length;
    if (marker != 0xDA) continue;
    // In entropy-coded data FF D9 cannot stand, so a file that ends in it is whole; only the others are
    // walked.
    if (file.big(file.size() - 2, 2) == 0xFFD9) break;
    offset = end_of_scan(file, offset);
  }
  CALDERA_CHECK(header.width > 0, DataError, "{}: a JPEG without a frame header", where);
  return header;
}

ImageHeader probe_png(const HeaderReader& file, const std::string& where) {
  ImageHeader header{ImageFormat::kPng};
  CALDERA_CHECK(file.size() < 16 || file.matches(12, "IHDR"), DataError,
                "{}: a PNG that does not begin with IHDR", where);
  header.width = static_cast<int64_t>(file.big(16, 4));
  header.height = static_cast<int64_t>(file.big(20, 4));
  header.bits_per_sample = static_cast<int64_t>(file.big(24, 1));
  header.is_gray = file.big(25, 1) == 0;
  for (int64_t offset = 8;;) {
    const auto length = static_cast<int64_t>(file.big(offset, 4));
    const bool is_end = file.matches(offset + 4, "IEND");
    offset += 8 + length + 4;
    if (offset > file.size()) file.truncated();
    if (is_end) return header;
  }
}

ImageHeader probe_webp(const HeaderReader& file, const std::string& where) {
  ImageHeader header{ImageFormat::kWebp};
  if (8 + static_cast<int64_t>(file.little(4, 4)) > file.size()) file.truncated();
  if (file.matches(12, "VP8X")) {
    header.is_animated = (file.little(20, 1) & 2) != 0;
    header.width = 1 + static_cast<int64_t>(file.little(24, 3));
    header.height = 1 + static_cast<int64_t>(file.little(27, 3));
  } else if (file.matches(12, "VP8L")) {
    const uint64_t bits = file.little(21, 4);
    header.width = 1 + static_cast<int64_t>(bits & 0x3FFF);
    header.height = 1 + static_cast<int64_t>(bits >> 14 & 0x3FFF);
  } else {
    CALDERA_CHECK(file.matches(12, "VP8 "), DataError, "{}: a WebP of an unknown kind", where);
    header.width = static_cast<int64_t>(file.little(26, 2) & 0x3FFF);
    header.height = static_cast<int64_t>(file.little(28, 2) & 0x3FFF);
  }
  return header;
}

ImageHeader probe_bmp(const HeaderReader& file, const std::string&) {
  ImageHeader header{ImageFormat::kBmp};
  const bool is_old = file.little(14, 4) == 12;  // BITMAPCOREHEADER: 16-bit sizes
  header.width = static_cast<int64_t>(is_old ? file.little(18, 2) : file.little(18, 4));
  const auto rows = static_cast<int32_t>(is_old ? file.little(20, 2) : file.little(22, 4));
  header.height = std::abs(static_cast<int64_t>(rows));  // negative: top to bottom
  const auto bits = static_cast<int64_t>(is_old ? file.little(24, 2) : file.little(28, 2));
  const uint64_t compression = is_old ? 0 : file.little(30, 4);
  if (compression == 0 && header.height > 0 && header.width <= kMaxImagePixels / header.height) {
    const auto begin = static_cast<int64_t>(file.little(10, 4));
    if (begin + (header.width * bits + 31) / 32 * 4 * header.height > file.size()) file.truncated();
  }
  return header;
}

ImageHeader probe_tiff(const HeaderReader& file, const std::string& where) {
  ImageHeader header{ImageFormat::kTiff};
  const bool is_big = file.matches(0, "MM");
  const auto read = [&](int64_t offset, int num_bytes) {
    return static_cast<int64_t>(is_big ? file.big(offset, num_bytes) : file.little(offset, num_bytes));
  };
  CALDERA_CHECK(read(2, 2) == 42, DataError, "{}: BigTIFF is not supported; convert it to PNG or JPEG",
                where);
  constexpr int64_t kFloat = 3;
  int64_t samples = 1, orientation = 1, sample_format = 1;
  bool has_extra = false;
  const int64_t directory = read(4, 4), num_entries = read(directory, 2);
  for (int64_t i = 0; i < num_entries; ++i) {
    const int64_t entry = directory + 2 + 12 * i, tag = read(entry, 2);
    const bool is_short = read(entry + 2, 2) == 3;  // SHORT, else LONG
    const int64_t value = read(entry + 8, is_short ? 2 : 4);
    if (tag == 256) header.width = value;
    if (tag == 257) header.height = value;
    if (tag == 258) header.bits_per_sample = read(entry + 4, 4) > 2 ? read(read(entry + 8, 4), 2) : value;
    if (tag == 274) orientation = value;
    if (tag == 277) samples = value;
    if (tag == 338) has_extra = true;
    if (tag == 339) sample_format = read(entry + 4, 4) > 2 ? read(read(entry + 8, 4), 2) : value;
  }
  CALDERA_CHECK(
      orientation <= 4, DataError,
      "{}: a TIFF that lies on its side (orientation {}); only upright ones are supported: convert it to "
      "PNG or JPEG",
      where, orientation);
  const int64_t most_bits = has_extra ? 8 : 16;
  CALDERA_CHECK(
      header.bits_per_sample <= most_bits && sample_format != kFloat, DataError,
      "{}: a TIFF of {} channels with {} bits each{}; supported are whole numbers of up to 8 bits, and "
      "of 16 without alpha: convert it to an 8-bit PNG",
      where, samples, header.bits_per_sample, sample_format == kFloat ? " (floating point)" : "");
  header.is_gray = samples == 1;
  header.has_alpha = samples == 4 && has_extra;
  return header;
}

ImageHeader probe_by_signature(const HeaderReader& file, const std::string& where) {
  if (file.matches(0, "\xFF\xD8\xFF")) return probe_jpeg(file, where);
  if (file.matches(0, "\x89PNG\r\n\x1A\n")) return probe_png(file, where);
  if (file.matches(0, "RIFF") && file.matches(8, "WEBP")) return probe_webp(file, where);
  if (file.matches(0, "GIF87a") || file.matches(0, "GIF89a")) {
    const GifSize size = probe_gif(file.bytes(), where);
    return {.format = ImageFormat::kGif, .height = size.height, .width = size.width};
  }
  if (file.matches(0, "BM")) return probe_bmp(file, where);
  if (file.matches(0, "II") || file.matches(0, "MM")) return probe_tiff(file, where);
  CALDERA_CHECK(file.size() > 0, DataError, "{}: the file is empty", where);
  throw DataError(
      fmt::format("{}: not a picture: expected the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF", where));
}

}  // namespace

ImageHeader probe_image(std::string_view bytes, const std::string& where) {
  const ImageHeader header = probe_by_signature(HeaderReader(bytes, where), where);
  CALDERA_CHECK(header.width > 0 && header.height > 0, DataError, "{}: a picture of {} x {} pixels", where,
                header.width, header.height);
  CALDERA_CHECK(header.width <= kMaxImagePixels / header.height, DataError,
                "{}: {} x {} pixels is more than the limit of {}; make the picture smaller", where,
                header.width, header.height, kMaxImagePixels);
  return header;
}

}  // namespace caldera
