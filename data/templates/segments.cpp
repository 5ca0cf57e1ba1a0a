#include "data/templates/segments.h"

#include "base/words.h"

namespace caldera {

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
