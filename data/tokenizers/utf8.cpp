#include "data/tokenizers/utf8.h"

namespace caldera {

char32_t next_code_point(std::string_view text, size_t& offset, bool* valid) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(offset++);
  if (valid != nullptr) *valid = true;
  if (lead < 0x80) return lead;
  // The second byte's range depends on the lead: no overlong forms, no surrogates, nothing above U+10FFFF.
  int trailing = 0;
  unsigned char low = 0x80, high = 0xBF;
  char32_t code_point = 0;
  if (lead >= 0xC2 && lead <= 0xDF) {
    trailing = 1;
    code_point = lead & 0x1Fu;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    trailing = 2;
    code_point = lead & 0x0Fu;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    trailing = 3;
    code_point = lead & 0x07u;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  }
  bool complete = trailing > 0;
  for (; trailing > 0; --trailing) {
    if (offset >= text.size() || byte(offset) < low || byte(offset) > high) {
      complete = false;
      break;
    }
    code_point = (code_point << 6) | (byte(offset++) & 0x3Fu);
    low = 0x80;
    high = 0xBF;
  }
  if (complete) return code_point;
  if (valid != nullptr) *valid = false;
  return kReplacement;
}

void append_utf8(std::string& text, char32_t code_point) {
  const auto put = [&](char32_t byte) { text += static_cast<char>(static_cast<unsigned char>(byte)); };
  if (code_point < 0x80) {
    put(code_point);
  } else if (code_point < 0x800) {
    put(0xC0 | (code_point >> 6));
    put(0x80 | (code_point & 0x3F));
  } else if (code_point < 0x10000) {
    put(0xE0 | (code_point >> 12));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  } else {
    put(0xF0 | (code_point >> 18));
    put(0x80 | ((code_point >> 12) & 0x3F));
    put(0x80 | ((code_point >> 6) & 0x3F));
    put(0x80 | (code_point & 0x3F));
  }
}

bool is_ascii(std::string_view text) {
  unsigned char bits = 0;
  for (const char c : text) bits = static_cast<unsigned char>(bits | static_cast<unsigned char>(c));
  return bits < 0x80;
}

bool is_valid_utf8(std::string_view text) {
  for (size_t offset = 0; offset < text.size();) {
    bool valid = true;
    next_code_point(text, offset, &valid);
    if (!valid) return false;
  }
  return true;
}

MappedText repair_utf8(std::string_view text) {
  if (is_valid_utf8(text)) return {std::string(text), {}};
  MappedText repaired;
  for (size_t offset = 0; offset < text.size();) {
    const size_t begin = offset;
    append_utf8(repaired.text, next_code_point(text, offset));
    repaired.origin.resize(repaired.text.size(), static_cast<uint32_t>(begin));
  }
  repaired.origin.push_back(static_cast<uint32_t>(text.size()));
  return repaired;
}

}  // namespace caldera
