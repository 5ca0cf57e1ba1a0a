// phi3: "<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n", as Phi-3's own template. Learned: the answer and its
// <|end|>. Phi-3's tokenizer takes white space behind these tokens along, so that the line breaks are no
// tokens (see Tokenizer::takes_space_behind).
#include "data/templates/segments.h"

namespace caldera {
namespace {

std::vector<Segment> render_phi3(const std::vector<Turn>& turns, bool for_generation) {
  SegmentBuilder out;
  if (const std::string system = system_of(turns, ""); !system.empty())
    out.control("<|system|>").text("\n").text(system).control("<|end|>").text("\n");
  for (const Turn& turn : turns) {
    const bool learned = !turn.from_human;
    out.control(turn.from_human ? "<|user|>" : "<|assistant|>").text("\n").value(turn.value, learned);
    out.control("<|end|>", learned).text("\n");
  }
  if (for_generation) out.control("<|assistant|>").text("\n");
  return out.take();
}

}  // namespace

const ConversationTemplate kPhi3 = {
    "phi3",
    render_phi3,
    {"<|end|>"},
    CALDERA_JINJA_BODY
    "{%- for message in messages -%}"
    "{{ '<|' + message['role'] + '|>\\n' + body(message['content']) + '<|end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"};

}  // namespace caldera
