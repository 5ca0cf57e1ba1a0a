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

// What the conversation's system turn says; where there is none, the template's own words.
inline std::string system_of(const std::vector<Turn>& turns, const std::string& own) {
  return turns.empty() || turns.front().system.empty() ? own : turns.front().system;
}

// Python's str.strip(), which LLaVA and Jinja's "trim" use.
std::string python_strip(std::string_view text);

// One per template; the table is in registry.cpp.
extern const ConversationTemplate kPlain, kV0, kLlavaV0, kV1, kLlavaV1, kLlama2, kLlavaLlama2, kChatml, kQwen,
    kMpt, kChatmlDirect, kLlama3, kLlavaLlama3, kMistralInstruct, kPhi3;

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
