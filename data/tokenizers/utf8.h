// UTF-8, as far as tokenizers need it.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace caldera {

// A text made from another one, and where in that one each of its bytes came from.
struct MappedText {
  std::string text;
  std::vector<uint32_t> origin;  // text.size() + 1 byte offsets; empty where the text is the original itself

  int64_t original(size_t offset) const {
    return origin.empty() ? static_cast<int64_t>(offset) : static_cast<int64_t>(origin[offset]);
  }
};

inline constexpr char32_t kReplacement = 0xFFFD;

// The code point that starts at `offset`, which moves past it. Of a broken sequence, the longest part that
// could have begun a valid one is taken and kReplacement returned, with *valid = false (the practice of
// Unicode, chapter 3.9, and Python's).
char32_t next_code_point(std::string_view text, size_t& offset, bool* valid = nullptr);
void append_utf8(std::string& text, char32_t code_point);
bool is_ascii(std::string_view text);
bool is_valid_utf8(std::string_view text);
// Each broken sequence becomes U+FFFD.
MappedText repair_utf8(std::string_view text);

}  // namespace caldera
