// llama_3: "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>...", what a turn says stripped, as LLaMA
// 3's own template has it. Learned: the answer and its <|eot_id|>. LLaMA 3.1 and later put dates into a
// system message of their own, which is left out here.
#include "data/templates/segments.h"

namespace caldera {
namespace {

void put_llama_3(SegmentBuilder& out, const char* role, const std::string& value, bool learned) {
  out.control("<|start_header_id|>").text(role).control("<|end_header_id|>").text("\n\n");
  out.value(python_strip(value), learned).control("<|eot_id|>", learned);
}

std::vector<Segment> render_llama_3(const std::string& own_system, const std::vector<Turn>& turns,
                                    bool for_generation) {
  SegmentBuilder out;
  if (const std::string system = system_of(turns, own_system); !system.empty())
    put_llama_3(out, "system", system, false);
  for (const Turn& turn : turns)
    put_llama_3(out, turn.from_human ? "user" : "assistant", turn.value, !turn.from_human);
  if (for_generation)
    out.control("<|start_header_id|>").text("assistant").control("<|end_header_id|>").text("\n\n");
  return out.take();
}

#define CALDERA_LLAVA_LLAMA_3_SYSTEM                                       \
  "You are a helpful language and vision assistant. "                      \
  "You are able to understand the visual content that the user provides, " \
  "and assist the user with a variety of tasks using natural language."

#define CALDERA_LLAMA_3_JINJA                                                                                \
  "{%- for message in messages -%}"                                                                          \
  "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + body(message['content']) | trim" \
  " + '<|eot_id|>' }}"                                                                                       \
  "{%- endfor -%}"                                                                                           \
  "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"

}  // namespace

const ConversationTemplate kLlama3 = {"llama_3",
                                      [](const std::vector<Turn>& turns, bool for_generation) {
                                        return render_llama_3("", turns, for_generation);
                                      },
                                      {"<|eot_id|>"},
                                      CALDERA_JINJA_BODY CALDERA_LLAMA_3_JINJA};

// With LLaVA-NeXT's system message.
const ConversationTemplate kLlavaLlama3 = {
    "llava_llama_3",
    [](const std::vector<Turn>& turns, bool for_generation) {
      return render_llama_3(CALDERA_LLAVA_LLAMA_3_SYSTEM, turns, for_generation);
    },
    {"<|eot_id|>"},
    CALDERA_JINJA_BODY
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n" CALDERA_LLAVA_LLAMA_3_SYSTEM
    "<|eot_id|>' }}{%- endif -%}" CALDERA_LLAMA_3_JINJA};

}  // namespace caldera
