#include "data/templates/segments.h"

#include <algorithm>

#include "base/words.h"
#include "data/tokenizers/utf8.h"

namespace caldera {
namespace {

// What Python's str.strip() takes off: Unicode's white space and the four information separators.
bool is_python_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

}  // namespace

std::string python_strip(std::string_view text) {
  size_t begin = text.size(), end = text.size();
  for (size_t offset = 0; offset < text.size();) {
    const size_t start = offset;
    if (is_python_space(next_code_point(text, offset))) continue;
    begin = std::min(begin, start);
    end = offset;
  }
  return begin == text.size() ? "" : std::string(text.substr(begin, end - begin));
}

SegmentBuilder& SegmentBuilder::text(std::string_view text, bool supervised) {
  if (!text.empty()) segments_.push_back({Segment::Kind::kText, std::string(text), supervised});
  return *this;
}

SegmentBuilder& SegmentBuilder::value(std::string_view value, bool supervised) {
  const std::string_view placeholder = kImagePlaceholder;
  for (size_t found = value.find(placeholder); found != std::string_view::npos;
       found = value.find(placeholder)) {
    text(value.substr(0, found), supervised);
    segments_.push_back({Segment::Kind::kImage, kImagePlaceholder, false});
    value.remove_prefix(found + placeholder.size());
  }
  return text(value, supervised);
}

SegmentBuilder& SegmentBuilder::control(std::string_view token, bool supervised) {
  segments_.push_back({Segment::Kind::kControl, std::string(token), supervised});
  return *this;
}

}  // namespace caldera
