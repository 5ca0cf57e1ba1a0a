// llama_2: "[INST] <<SYS>>\nSYSTEM\n<</SYS>>\n\nq [/INST] a </s><s>[INST] q [/INST] a </s>". Learned: " a "
// and </s>.
//
// LLaVA silently masks a whole sample where a turn contains "[/INST] " or "</s>", or an answer is empty; here
// labels come from the turns themselves (see v1.cpp).
#include "data/templates/segments.h"

namespace caldera {
namespace {

constexpr const char* kLlama2System =
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your "
    "answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
    "content. Please ensure "
    "that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not "
    "correct. If you don't know the answer to a question, please don't share false information.";
#define CALDERA_LLAVA_LLAMA_2_SYSTEM                                       \
  "You are a helpful language and vision assistant. "                      \
  "You are able to understand the visual content that the user provides, " \
  "and assist the user with a variety of tasks using natural language."

std::vector<Segment> render_llama_2(const std::string& system, const std::vector<Turn>& turns) {
  SegmentBuilder out;
  bool first = true;
  for (const Turn& turn : turns) {
    if (!turn.from_human) {
      if (!turn.value.empty())
        out.text(" ", true).value(turn.value, true).text(" ", true).control("</s>", true);
      continue;
    }
    if (first) {
      out.text("[INST] <<SYS>>\n" + system_of(turns, system) + "\n<</SYS>>\n\n");
    } else {
      if (turn.value.empty()) continue;
      out.control("<s>").text("[INST] ");
    }
    out.value(turn.value).text(" [/INST]");
    first = false;
  }
  return out.take();
}

}  // namespace

// LLaMA 2's own system message.
const ConversationTemplate kLlama2 = {
    "llama_2",
    [](const std::vector<Turn>& turns, bool) { return render_llama_2(kLlama2System, turns); },
    {"</s>"},
    ""};

// The one that LLaVA trains LLaMA 2 chat models with.
const ConversationTemplate kLlavaLlama2 = {
    "llava_llama_2",
    [](const std::vector<Turn>& turns, bool) { return render_llama_2(CALDERA_LLAVA_LLAMA_2_SYSTEM, turns); },
    {"</s>"},
    CALDERA_JINJA_BODY
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if loop.first -%}{{ '[INST] <<SYS>>\\n" CALDERA_LLAVA_LLAMA_2_SYSTEM
    "\\n<</SYS>>\\n\\n' }}"
    "{%- else -%}{{ '<s>[INST] ' }}{%- endif -%}"
    "{{ body(message['content']) + ' [/INST]' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ' + body(message['content']) + ' </s>' }}"
    "{%- endif -%}{%- endfor -%}"};

}  // namespace caldera
