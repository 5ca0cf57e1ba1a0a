// plain (LLaVA's first stage): the picture, its caption, a newline. The human turn's words are dropped.
// Learned: caption and newline.
#include "base/error.h"
#include "base/words.h"
#include "data/templates/segments.h"

namespace caldera {
namespace {

// A record without a picture is its text alone, which LLaVA has no use for and language pretraining has.
std::vector<Segment> render_plain(const std::vector<Turn>& turns, bool for_generation) {
  const size_t expected = for_generation ? 1 : 2;
  CALDERA_CHECK(turns.size() == expected && turns[0].from_human, DataError,
                "template plain takes one human turn and one answer, got {} turns; use a template for "
                "conversations (v1, chatml)",
                turns.size());
  CALDERA_CHECK(
      turns[0].system.empty(), DataError,
      "template plain has no place for a system message; use a template for conversations (v1, chatml)");
  SegmentBuilder out;
  const std::string_view value = turns[0].value, placeholder = kImagePlaceholder;
  for (size_t at = value.find(placeholder); at != std::string_view::npos;
       at = value.find(placeholder, at + 1)) {
    out.value(placeholder);
  }
  if (!for_generation) out.value(turns[1].value, true).text("\n", true);
  return out.take();
}

}  // namespace

const ConversationTemplate kPlain = {
    "plain",
    render_plain,
    {"\n"},
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] + '\\n' }}"
    "{%- elif '<image>' in message['content'] -%}{{ '<image>' }}{%- endif -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}"
    "{%- elif message['role'] == 'assistant' and part['type'] == 'text' -%}{{ part['text'] + '\\n' }}{%- "
    "endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}"};

}  // namespace caldera
