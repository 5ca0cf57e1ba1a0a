// mistral_instruct, as LLaVA 1.6 trains Mistral: "[INST] q [/INST] a </s>[INST] q [/INST] a </s>". Learned: "
// a " and </s>. A system message stands before the first question, as LLaMA 2's.
#include "data/templates/segments.h"

namespace caldera {
namespace {

std::vector<Segment> render_mistral(const std::vector<Turn>& turns, bool) {
  SegmentBuilder out;
  const std::string system = system_of(turns, "");
  bool is_first = true;
  for (const Turn& turn : turns) {
    if (!turn.from_human) {
      out.text(" ", true).value(turn.value, true).text(" ", true).control("</s>", true);
      continue;
    }
    out.text("[INST] ");
    if (is_first && !system.empty()) out.text("<<SYS>>\n" + system + "\n<</SYS>>\n\n");
    out.value(turn.value).text(" [/INST]");
    is_first = false;
  }
  return out.take();
}

}  // namespace

const ConversationTemplate kMistralInstruct = {
    "mistral_instruct",
    render_mistral,
    {"</s>"},
    CALDERA_JINJA_BODY
    "{%- set system = namespace(text='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{%- set system.text = '<<SYS>>\\n' + body(message['content']) + '\\n<</SYS>>\\n\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '[INST] ' + system.text + body(message['content']) + ' [/INST]' }}{%- set system.text = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + body(message['content']) + ' </s>' }}"
    "{%- endif -%}{%- endfor -%}"};

}  // namespace caldera
