// ChatML: "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n". Learned: the answer and its
// <|im_end|>.
//
// chatml is what SmolLM2 and Qwen2 were tuned on; qwen is LLaVA-NeXT's, with a system message. mpt and
// chatml_direct are LLaVA's: no line break behind <|im_end|>. What is learned is the same for all: LLaVA
// counts the rounds of mpt one token short, so that its ends of answers are not learned, and LLaVA-NeXT's
// qwen learns the headers and line breaks of all turns as well.
#include "data/templates/segments.h"

namespace caldera {
namespace {

std::vector<Segment> render_chatml(const std::string& own_system, const std::string& behind,
                                   const std::vector<Turn>& turns, bool for_generation) {
  SegmentBuilder out;
  if (const std::string system = system_of(turns, own_system); !system.empty())
    out.control("<|im_start|>").text("system\n").text(system).control("<|im_end|>").text(behind);
  for (const Turn& turn : turns) {
    const bool learned = !turn.from_human;
    out.control("<|im_start|>").text(turn.from_human ? "user\n" : "assistant\n").value(turn.value, learned);
    out.control("<|im_end|>", learned).text(behind);
  }
  if (for_generation) out.control("<|im_start|>").text("assistant\n");
  return out.take();
}

#define CALDERA_CHATML_JINJA(behind)                                                            \
  "{%- for message in messages -%}"                                                             \
  "{{ '<|im_start|>' + message['role'] + '\\n' + body(message['content']) + '<|im_end|>" behind \
  "' }}"                                                                                        \
  "{%- endfor -%}"                                                                              \
  "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
#define CALDERA_CHATML_SYSTEM_JINJA(system, behind)                                                \
  CALDERA_JINJA_BODY                                                                               \
  "{%- if messages[0]['role'] != 'system' -%}{{ '<|im_start|>system\\n" system "<|im_end|>" behind \
  "' }}{%- endif -%}" CALDERA_CHATML_JINJA(behind)

#define CALDERA_MPT_SYSTEM                                        \
  "A conversation between a user and an LLM-based AI assistant. " \
  "The assistant gives helpful and honest answers."
#define CALDERA_QWEN_SYSTEM "You are a helpful assistant."
#define CALDERA_CHATML_DIRECT_SYSTEM "Answer the questions."

}  // namespace

const ConversationTemplate kChatml = {"chatml",
                                      [](const std::vector<Turn>& turns, bool for_generation) {
                                        return render_chatml("", "\n", turns, for_generation);
                                      },
                                      {"<|im_end|>"},
                                      CALDERA_JINJA_BODY CALDERA_CHATML_JINJA("\\n")};

const ConversationTemplate kQwen = {"qwen",
                                    [](const std::vector<Turn>& turns, bool for_generation) {
                                      return render_chatml(CALDERA_QWEN_SYSTEM, "\n", turns, for_generation);
                                    },
                                    {"<|im_end|>"},
                                    CALDERA_CHATML_SYSTEM_JINJA(CALDERA_QWEN_SYSTEM, "\\n")};

const ConversationTemplate kMpt = {"mpt",
                                   [](const std::vector<Turn>& turns, bool for_generation) {
                                     return render_chatml(CALDERA_MPT_SYSTEM, "", turns, for_generation);
                                   },
                                   {"<|im_end|>"},
                                   CALDERA_CHATML_SYSTEM_JINJA(CALDERA_MPT_SYSTEM, "")};

const ConversationTemplate kChatmlDirect = {"chatml_direct",
                                            [](const std::vector<Turn>& turns, bool for_generation) {
                                              return render_chatml(CALDERA_CHATML_DIRECT_SYSTEM, "", turns,
                                                                   for_generation);
                                            },
                                            {"<|im_end|>"},
                                            CALDERA_CHATML_SYSTEM_JINJA(CALDERA_CHATML_DIRECT_SYSTEM, "")};

}  // namespace caldera
