#include "data/webp.h"

#include <algorithm>

#include "base/error.h"

namespace caldera {
namespace {

constexpr size_t kChunkHeader = 8;

int64_t little(std::string_view bytes, size_t offset, size_t num_bytes) {
  int64_t value = 0;
  for (size_t i = num_bytes; i-- > 0;) value = value << 8 | static_cast<unsigned char>(bytes[offset + i]);
  return value;
}

std::string with_length(std::string_view name, std::string_view body) {
  std::string chunk(name);
  for (unsigned i = 0; i < 4; ++i)
    chunk += static_cast<char>(static_cast<unsigned char>(body.size() >> (8 * i)));
  chunk += body;
  if (body.size() % 2 == 1) chunk += '\0';
  return chunk;
}

// Calls take(name, body) for each chunk until it returns true; whether it did.
template <class Take>
bool find_chunk(std::string_view chunks, const Take& take) {
  while (chunks.size() >= kChunkHeader) {
    const auto length = static_cast<size_t>(little(chunks, 4, 4));
    if (length > chunks.size() - kChunkHeader) return false;
    if (take(chunks.substr(0, 4), chunks.substr(kChunkHeader, length))) return true;
    chunks.remove_prefix(std::min(kChunkHeader + length + length % 2, chunks.size()));
  }
  return false;
}

std::string three_bytes(int64_t value) {
  std::string bytes;
  for (int i = 0; i < 3; ++i) bytes += static_cast<char>(static_cast<unsigned char>(value >> (8 * i)));
  return bytes;
}

}  // namespace

WebpFrame first_webp_frame(std::string_view bytes, int64_t height, int64_t width, const std::string& where) {
  constexpr size_t kFileHeader = 12, kFrameHeader = 16;
  std::string_view body;
  find_chunk(bytes.substr(std::min(kFileHeader, bytes.size())),
             [&](std::string_view name, std::string_view chunk) {
               if (name == "ANMF") body = chunk;
               return name == "ANMF";
             });
  CALDERA_CHECK(body.size() > kFrameHeader, DataError,
                "{}: an animated WebP without a whole frame; replace the file or drop the record", where);
  WebpFrame frame{.top = 2 * little(body, 3, 3),
                  .left = 2 * little(body, 0, 3),
                  .height = little(body, 9, 3) + 1,
                  .width = little(body, 6, 3) + 1};
  CALDERA_CHECK(
      frame.top + frame.height <= height && frame.left + frame.width <= width, DataError,
      "{}: an animated WebP whose first frame ({} x {} at {}, {}) reaches beyond the picture of {} x {}",
      where, frame.width, frame.height, frame.left, frame.top, width, height);
  std::string alpha, data;
  find_chunk(body.substr(kFrameHeader), [&](std::string_view name, std::string_view chunk) {
    if (name == "ALPH") alpha = with_length(name, chunk);
    if (name == "VP8 " || name == "VP8L") data = with_length(name, chunk);
    return !data.empty();
  });
  CALDERA_CHECK(!data.empty(), DataError,
                "{}: an animated WebP without a whole frame; replace the file or drop the record", where);
  if (!alpha.empty()) {
    constexpr char kHasAlpha = 0x10;
    data = with_length("VP8X", std::string{kHasAlpha, 0, 0, 0} + three_bytes(frame.width - 1) +
                                   three_bytes(frame.height - 1)) +
           alpha + data;
  }
  frame.still = with_length("RIFF", "WEBP" + data);
  return frame;
}

}  // namespace caldera
