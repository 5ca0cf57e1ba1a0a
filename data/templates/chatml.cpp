// ChatML: "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n". Learned: the answer and its
// <|im_end|>. LLaVA has no template of quite this form (its mpt lacks the newline after <|im_end|>); it is
// what SmolLM2 and Qwen2 were tuned on.
#include "data/templates/segments.h"

namespace caldera {
namespace {

std::vector<Segment> render_chatml(const std::vector<Turn>& turns, bool for_generation) {
  SegmentBuilder out;
  for (const Turn& turn : turns) {
    const bool learned = !turn.from_human;
    out.control("<|im_start|>").text(turn.from_human ? "user\n" : "assistant\n").value(turn.value, learned);
    out.control("<|im_end|>", learned).text("\n");
  }
  if (for_generation) out.control("<|im_start|>").text("assistant\n");
  return out.take();
}

}  // namespace

const ConversationTemplate kChatml = {
    "chatml",
    render_chatml,
    {"<|im_end|>"},
    CALDERA_JINJA_BODY
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + body(message['content']) + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"};

}  // namespace caldera
