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
      kQwen,    // LLaVA-NeXT's Qwen2
      kMpt,
      kChatmlDirect,
      kLlama3,
      kLlavaLlama3,
      kMistralInstruct,
      kPhi3,
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

const ConversationTemplate* recognise_template(const std::string& jinja) {
  if (jinja.empty()) return nullptr;
  for (const ConversationTemplate& conversation : conversation_templates()) {
    if (jinja == conversation.jinja) return &conversation;
  }
  const auto has = [&](const char* words) { return jinja.find(words) != std::string::npos; };
  // LLaVA-OneVision's has a space where ChatML has a line break.
  if (has("<|im_start|>") && !has("['role'] + ' '")) return &find_template("chatml");
  if (has("<|start_header_id|>") && has("<|eot_id|>") && !has("Cutting Knowledge"))
    return &find_template("llama_3");
  if (has("<|user|>") && has("<|assistant|>") && has("<|end|>")) return &find_template("phi3");
  return nullptr;
}

const ConversationTemplate& template_of(const Tokenizer& tokenizer) {
  const std::string& jinja = tokenizer.chat_template();
  if (const ConversationTemplate* known = recognise_template(jinja)) return *known;
  throw ConfigError(
      jinja.empty()
          ? "the tokenizer has no chat template of its own; name one with --template"
          : "the tokenizer's own chat template is none that is known here; name one with --template");
}

std::string exported_chat_template(const ConversationTemplate& conversation, const Tokenizer& tokenizer) {
  const std::string& own = tokenizer.chat_template();
  const ConversationTemplate* known = recognise_template(own);
  // A system message of its own would be one that training did not have.
  const bool is_same = known != nullptr && std::string_view(known->name) == conversation.name &&
                       (own == conversation.jinja || own.find("You are") == std::string::npos);
  if (!is_same) return conversation.jinja[0] == '\0' ? own : conversation.jinja;
  if (own.find("'image'") != std::string::npos || own.find("\"image\"") != std::string::npos) return own;
  // It was written for text: what a turn says becomes that first, pictures and all.
  return CALDERA_JINJA_BODY
         "{%- set as_text = namespace(messages=[]) -%}"
         "{%- for message in messages -%}"
         "{%- set as_text.messages = as_text.messages + [dict(message, content=body(message['content']))] -%}"
         "{%- endfor -%}{%- set messages = as_text.messages -%}" +
         own;
}

}  // namespace caldera
