// Conversation templates by LLaVA's names: how turns become one text, and which bytes of it are learned. Each template is one
// file that exports a ConversationTemplate, and one line in registry.cpp.
#pragma once
#include <span>
#include <string>
#include <vector>

#include "data/record.h"
#include "data/tokenizer.h"

namespace caldera {

// A stretch of a rendered conversation.
struct Segment {
  enum class Kind {
    kText,     // encoded as characters
    kImage,    // one image placeholder
    kControl,  // one control token, named by its text ("</s>")
  };
  Kind kind = Kind::kText;
  std::string text;
  bool supervised = false;
};

struct ConversationTemplate {
  const char* name;
  // Renders turns (human first). With `for_generation` the last turn must be human's, and the text ends where the answer
  // would begin. Adjacent text segments are tokenised as one string, as LLaVA does.
  std::vector<Segment> (*render)(const std::vector<Turn>& turns, bool for_generation);
  // Control tokens, or plain text, that end an answer.
  std::vector<std::string> stop_tokens;
  // The same template as a Jinja chat template, for the exported folder ("" where it has none).
  const char* jinja;
};

std::span<const ConversationTemplate> conversation_templates();
// Throws ConfigError naming the known ones.
const ConversationTemplate& find_template(const std::string& name);
// The template that a Jinja chat template amounts to (ChatML -> "chatml"), null where it is none of these.
const ConversationTemplate* recognise_template(const std::string& jinja);
// That of a tokenizer's own; throws ConfigError saying to name one.
const ConversationTemplate& template_of(const Tokenizer& tokenizer);
// The Jinja chat template for an exported folder: the tokenizer's own where it amounts to the conversation's
// template (made to take pictures where it does not) or where that has none, else the conversation's.
std::string exported_chat_template(const ConversationTemplate& conversation, const Tokenizer& tokenizer);

// A tokenised sample, images not yet expanded: exactly what LLaVA's preprocessing gives.
struct TokenizedSample {
  std::vector<int64_t> input_ids;  // kImageTokenIndex once an image
  std::vector<int64_t> labels;     // kIgnoreIndex where nothing is learned
};

// Labels come from the segments as they are tokenised. preprocess_multimodal first: in a turn with <image>, the
// placeholder moves to the front ("<image>\n...") as LLaVA does, unless the record has several images.
// Throws DataError where a control token of the template is not in the tokenizer.
TokenizedSample tokenize(const Record& record, const ConversationTemplate& conversation, const Tokenizer& tokenizer);
// The prompt for an answer to the last human turn.
std::vector<int64_t> tokenize_prompt(const std::vector<Turn>& turns, const ConversationTemplate& conversation,
                                     const Tokenizer& tokenizer);
// Ids that end an answer; of plain text, the token it begins with in the middle of a text.
std::vector<int64_t> stop_ids(const ConversationTemplate& conversation, const Tokenizer& tokenizer);
// The ends that are plain text ("\n", "###"): a token may hold more than them (".\n"), so only the decoded
// text tells.
std::vector<std::string> stop_texts(const ConversationTemplate& conversation, const Tokenizer& tokenizer);

}  // namespace caldera
