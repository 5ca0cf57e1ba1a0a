// The format: CompuServe's "Graphics Interchange Format, version 89a", with LZW as its appendix F states it.
#include "data/gif.h"

#include <algorithm>
#include <array>
#include <optional>

#include "base/error.h"

namespace caldera {
namespace {

struct GifFrame {
  int64_t screen_height = 0, screen_width = 0;  // pixels
  int64_t top = 0, left = 0, height = 0, width = 0;
  bool interlaced = false;
  std::string_view colours;          // of the frame, else of the file: 3 bytes each; empty: shades of grey
  std::optional<uint8_t> no_colour;  // the transparent index
  int code_size = 0;                 // bits of a pixel in the compressed data
  std::string data;                  // compressed, its blocks put together
};

class Parser {
 public:
  Parser(std::string_view bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  // `with_data`: the frame's data are copied out, not only walked over.
  GifFrame parse(bool with_data) {
    GifFrame frame;
    position_ = 6;  // the signature
    frame.screen_width = number(2);
    frame.screen_height = number(2);
    const int64_t flags = number(1);
    take(2);  // background, aspect
    if ((flags & 0x80) != 0) frame.colours = take(3u << ((flags & 7) + 1));
    for (;;) {
      const int64_t block = number(1);
      if (block == 0x2C) break;
      CALDERA_CHECK(block == 0x21, DataError, "{}: a GIF without a frame", where_);
      const int64_t label = number(1), size = number(1);
      const std::string_view extension = take(static_cast<size_t>(size));
      if (label == 0xF9 && size >= 4 && (extension[0] & 1) != 0)
        frame.no_colour = static_cast<uint8_t>(extension[3]);
      if (size > 0) blocks(nullptr);
    }
    frame.left = number(2);
    frame.top = number(2);
    frame.width = number(2);
    frame.height = number(2);
    const int64_t local = number(1);
    frame.interlaced = (local & 0x40) != 0;
    if ((local & 0x80) != 0) frame.colours = take(3u << ((local & 7) + 1));
    frame.code_size = static_cast<int>(number(1));
    blocks(with_data ? &frame.data : nullptr);
    frame.screen_width = std::max(frame.screen_width, frame.left + frame.width);
    frame.screen_height = std::max(frame.screen_height, frame.top + frame.height);
    return frame;
  }

 private:
  std::string_view take(size_t size) {
    CALDERA_CHECK(size <= bytes_.size() - std::min(position_, bytes_.size()), DataError,
                  "{}: the picture is truncated: it ends after {} bytes, before its data does; replace the "
                  "file or drop "
                  "the record",
                  where_, bytes_.size());
    const std::string_view part = bytes_.substr(position_, size);
    position_ += size;
    return part;
  }
  int64_t number(size_t num_bytes) {
    int64_t value = 0;
    const std::string_view part = take(num_bytes);
    for (size_t i = num_bytes; i-- > 0;) value = value << 8 | static_cast<unsigned char>(part[i]);
    return value;
  }
  void blocks(std::string* out) {
    while (const auto size = static_cast<size_t>(number(1))) {
      const std::string_view block = take(size);
      if (out != nullptr) *out += block;
    }
  }

  std::string_view bytes_;
  const std::string& where_;
  size_t position_ = 0;
};

// The frame's pixels as indices of its colours, in the order of the data. Stops where the data do.
std::vector<uint8_t> decompress(const GifFrame& frame, size_t num_pixels) {
  constexpr int kMaxBits = 12;
  struct Entry {
    int16_t prefix = 0;  // the code before its last pixel
    uint8_t last = 0, first = 0;
    uint16_t length = 1;
  };
  const int clear = 1 << frame.code_size, end = clear + 1;
  std::array<Entry, 1 << kMaxBits> table;
  for (int i = 0; i < clear; ++i)
    table[static_cast<size_t>(i)] = {0, static_cast<uint8_t>(i), static_cast<uint8_t>(i), 1};
  int next = end + 1, bits = frame.code_size + 1, previous = -1;
  uint32_t buffer = 0;
  int buffered = 0;
  size_t position = 0;
  std::vector<uint8_t> pixels;
  pixels.reserve(num_pixels);
  while (pixels.size() < num_pixels) {
    while (buffered < bits && position < frame.data.size()) {
      buffer |= static_cast<uint32_t>(static_cast<unsigned char>(frame.data[position++])) << buffered;
      buffered += 8;
    }
    if (buffered < bits) break;
    const int code = static_cast<int>(buffer & ((1u << bits) - 1));
    buffer >>= bits;
    buffered -= bits;
    if (code == end) break;
    if (code == clear) {
      next = end + 1;
      bits = frame.code_size + 1;
      previous = -1;
      continue;
    }
    // A code that is about to be made means: the previous string and its own first pixel.
    const bool is_new = code == next && previous >= 0 && next < (1 << kMaxBits);
    if (code >= next && !is_new) break;
    if (previous >= 0 && next < (1 << kMaxBits)) {
      const Entry& before = table[static_cast<size_t>(previous)];
      const uint8_t last = is_new ? before.first : table[static_cast<size_t>(code)].first;
      table[static_cast<size_t>(next)] = {static_cast<int16_t>(previous), last, before.first,
                                          static_cast<uint16_t>(before.length + 1)};
      ++next;
      if (next == (1 << bits) && bits < kMaxBits) ++bits;
    }
    const size_t length = table[static_cast<size_t>(code)].length, begin = pixels.size();
    pixels.resize(begin + length);
    for (size_t i = length, at = static_cast<size_t>(code); i-- > 0;
         at = static_cast<size_t>(table[at].prefix))
      pixels[begin + i] = table[at].last;
    previous = code;
  }
  return pixels;
}

// The rows in the order in which an interlaced frame stores them.
std::vector<int64_t> row_order(const GifFrame& frame) {
  std::vector<int64_t> order;
  const std::pair<int64_t, int64_t> interlaced[] = {{0, 8}, {4, 8}, {2, 4}, {1, 2}}, plain[] = {{0, 1}};
  const auto add = [&](std::pair<int64_t, int64_t> pass) {
    for (int64_t y = pass.first; y < frame.height; y += pass.second) order.push_back(y);
  };
  if (frame.interlaced)
    for (const auto& pass : interlaced) add(pass);
  else
    add(plain[0]);
  return order;
}

}  // namespace

GifSize probe_gif(std::string_view bytes, const std::string& where) {
  const GifFrame frame = Parser(bytes, where).parse(false);
  return {frame.screen_height, frame.screen_width};
}

Image decode_gif(std::string_view bytes, const std::string& where) {
  const GifFrame frame = Parser(bytes, where).parse(true);
  const auto num_pixels = static_cast<size_t>(frame.height * frame.width);
  const bool sound = frame.code_size >= 1 && frame.code_size <= 8;
  const std::vector<uint8_t> indices = sound ? decompress(frame, num_pixels) : std::vector<uint8_t>();
  CALDERA_CHECK(sound && indices.size() >= num_pixels, DataError,
                "{}: the picture's data is broken and cannot be decoded; replace the file or drop the record",
                where);
  std::array<std::array<uint8_t, 3>, 256> colours{};  // indices beyond the palette: black
  for (size_t i = 0; i < 256; ++i)
    for (size_t c = 0; c < 3; ++c) {
      if (frame.colours.empty()) colours[i][c] = static_cast<uint8_t>(i);
      if (i * 3 + c < frame.colours.size()) colours[i][c] = static_cast<uint8_t>(frame.colours[i * 3 + c]);
    }
  Image image{frame.screen_height, frame.screen_width, {}};
  image.pixels.reserve(static_cast<size_t>(image.height * image.width * 3));
  const auto& outside = colours[frame.no_colour.value_or(0)];
  for (int64_t i = 0; i < image.height * image.width; ++i)
    image.pixels.insert(image.pixels.end(), outside.begin(), outside.end());
  size_t next = 0;
  for (const int64_t y : row_order(frame)) {
    auto out = image.pixels.begin() + ((frame.top + y) * image.width + frame.left) * 3;
    for (int64_t x = 0; x < frame.width; ++x) out = std::copy_n(colours[indices[next++]].begin(), 3, out);
  }
  return image;
}

}  // namespace caldera
