// What the templates are written with.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "data/template.h"

namespace caldera {

class SegmentBuilder {
 public:
  // The template's own words: never an image.
  SegmentBuilder& text(std::string_view text, bool supervised = false);
  // What a turn says: each <image> in it becomes an image placeholder.
  SegmentBuilder& value(std::string_view value, bool supervised = false);
  SegmentBuilder& control(std::string_view token, bool supervised = false);
  std::vector<Segment> take() { return std::move(segments_); }

 private:
  std::vector<Segment> segments_;
};

// One per template file; the table is in registry.cpp.
extern const ConversationTemplate kPlain, kV0, kLlavaV0, kV1, kLlavaV1, kLlama2, kLlavaLlama2, kChatml;

// Jinja: macro `body(content)` writes what a turn says, given as HF's processors have it: a string, or a list
// of parts of type "image" and "text". A single picture comes first, on a line of its own, as in training;
// several stay where they stand.
#define CALDERA_JINJA_BODY                                                                   \
  "{%- macro body(content) -%}"                                                              \
  "{%- if content is string -%}{{ content }}{%- else -%}"                                    \
  "{%- set images = content | selectattr('type', 'equalto', 'image') | list -%}"             \
  "{%- if images | length == 1 -%}{{ '<image>\\n' }}{%- endif -%}"                           \
  "{%- for part in content -%}"                                                              \
  "{%- if part['type'] == 'text' -%}{{ part['text'] }}"                                      \
  "{%- elif part['type'] == 'image' and images | length > 1 -%}{{ '<image>' }}{%- endif -%}" \
  "{%- endfor -%}{%- endif -%}{%- endmacro -%}"

}  // namespace caldera
