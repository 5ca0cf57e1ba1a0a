#include "train/distributed/packed_texts.h"

#include <charconv>

#include "base/error.h"

namespace caldera {

// Each as "LENGTH:BYTES".
std::string pack_texts(const std::vector<std::string>& texts) {
  std::string packed;
  for (const std::string& text : texts) packed += fmt::format("{}:{}", text.size(), text);
  return packed;
}

std::vector<std::string> unpack_texts(const std::string& packed) {
  std::vector<std::string> texts;
  for (size_t at = 0; at < packed.size();) {
    const char* const end = packed.data() + packed.size();
    size_t length = 0;
    const auto [colon, error] = std::from_chars(packed.data() + at, end, length);
    const bool is_text =
        error == std::errc() && colon != end && *colon == ':' && length < static_cast<size_t>(end - colon);
    CALDERA_CHECK(is_text, DistributedError,
                  "what the ranks exchanged is damaged: expected LENGTH:TEXT at byte {} of {}, got \"{}\"",
                  at, packed.size(), packed.substr(at, 24));
    at = static_cast<size_t>(colon - packed.data()) + 1;
    texts.push_back(packed.substr(at, length));
    at += length;
  }
  return texts;
}

}  // namespace caldera
