#include "base/error.h"
#include "base/strings.h"
#include "data/templates/segments.h"

namespace caldera {
namespace {

ConversationTemplate alias(const char* name, ConversationTemplate conversation) {
  conversation.name = name;
  return conversation;
}

}  // namespace

std::span<const ConversationTemplate> conversation_templates() {
  // A function's own table: the templates' objects are complete by the time it is first asked for.
  static const std::vector<ConversationTemplate> table = {
      kPlain,  // LLaVA stage 1
      kV1,     // LLaVA 1.5, Vicuna
      alias("vicuna_v1", kV1),
      kLlavaV1,
      kV0,
      kLlavaV0,
      kLlama2,
      kLlavaLlama2,
      kChatml,  // SmolLM2, Qwen2
  };
  return table;
}

const ConversationTemplate& find_template(const std::string& name) {
  std::vector<std::string> names;
  for (const ConversationTemplate& conversation : conversation_templates()) {
    if (name == conversation.name) return conversation;
    names.emplace_back(conversation.name);
  }
  throw ConfigError(fmt::format("unknown conversation template \"{}\"{}; known: {}", name,
                                near_match(name, names).empty() ? "" : suggestion(name, names),
                                join(names, ", ")));
}

const ConversationTemplate& template_of(const Tokenizer& tokenizer) {
  const std::string& jinja = tokenizer.chat_template();
  for (const ConversationTemplate& conversation : conversation_templates()) {
    if (!jinja.empty() && jinja == conversation.jinja) return conversation;
  }
  if (jinja.find("<|im_start|>") != std::string::npos) return find_template("chatml");
  throw ConfigError(
      jinja.empty()
          ? "the tokenizer has no chat template of its own; name one with --template"
          : "the tokenizer's own chat template is none that is known here; name one with --template");
}

}  // namespace caldera
