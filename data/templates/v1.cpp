// v1 (Vicuna 1.1 and LLaVA 1.5): "SYSTEM USER: q ASSISTANT: a</s>USER: ...". Learned: the answer, with the
// space before it, and the </s> after it.
//
// LLaVA finds rounds and answers again in the rendered text and silently masks a whole sample where that
// fails: a turn that contains " ASSISTANT: " or "</s>", an empty question or an empty answer. Here labels
// come from the turns themselves, so such samples keep theirs. An empty answer renders "ASSISTANT:" without
// </s>, as in LLaVA, and has nothing to learn.
#include "data/templates/segments.h"

namespace caldera {
namespace {

std::vector<Segment> render_two(const char* system, const std::vector<Turn>& turns, bool for_generation) {
  SegmentBuilder out;
  out.text(system_of(turns, system)).text(" ");
  for (const Turn& turn : turns) {
    out.text(turn.from_human ? "USER:" : "ASSISTANT:");
    if (turn.value.empty()) continue;
    out.text(" ", !turn.from_human).value(turn.value, !turn.from_human);
    if (turn.from_human) {
      out.text(" ");
    } else {
      out.control("</s>", true);
    }
  }
  if (for_generation) out.text("ASSISTANT:");
  return out.take();
}

#define CALDERA_V1_JINJA(system)                                                                       \
  CALDERA_JINJA_BODY                                                                                   \
  "{{ \"" system                                                                                       \
  " \" }}"                                                                                             \
  "{%- for message in messages -%}"                                                                    \
  "{%- if message['role'] == 'user' -%}{{ 'USER: ' + body(message['content']) + ' ' }}"                \
  "{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' + body(message['content']) + '</s>' }}" \
  "{%- endif -%}{%- endfor -%}"                                                                        \
  "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"

#define CALDERA_V1_SYSTEM                                                    \
  "A chat between a curious user and an artificial intelligence assistant. " \
  "The assistant gives helpful, detailed, and polite answers to the user's questions."
#define CALDERA_LLAVA_V1_SYSTEM                                               \
  "A chat between a curious human and an artificial intelligence assistant. " \
  "The assistant gives helpful, detailed, and polite answers to the human's questions."

}  // namespace

const ConversationTemplate kV1 = {"v1",
                                  [](const std::vector<Turn>& turns, bool for_generation) {
                                    return render_two(CALDERA_V1_SYSTEM, turns, for_generation);
                                  },
                                  {"</s>"},
                                  CALDERA_V1_JINJA(CALDERA_V1_SYSTEM)};

// What LLaVA's demo used for models of this kind.
const ConversationTemplate kLlavaV1 = {"llava_v1",
                                       [](const std::vector<Turn>& turns, bool for_generation) {
                                         return render_two(CALDERA_LLAVA_V1_SYSTEM, turns, for_generation);
                                       },
                                       {"</s>"},
                                       CALDERA_V1_JINJA(CALDERA_LLAVA_V1_SYSTEM)};

}  // namespace caldera
