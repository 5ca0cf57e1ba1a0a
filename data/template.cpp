#include "data/template.h"

#include <algorithm>

#include "base/error.h"
#include "base/strings.h"
#include "base/words.h"
#include "data/templates/segments.h"

namespace caldera {
namespace {

// LLaVA's preprocess_multimodal.
std::vector<Turn> image_first(std::vector<Turn> turns) {
  for (Turn& turn : turns) {
    if (turn.value.find(kImagePlaceholder) == std::string::npos) continue;
    turn.value = python_strip(std::string(kImagePlaceholder) + "\n" +
                              python_strip(replace_all(turn.value, kImagePlaceholder, "")));
  }
  return turns;
}

int64_t control_id(const std::string& token, const ConversationTemplate& conversation,
                   const Tokenizer& tokenizer) {
  const int64_t id = tokenizer.token_id(token);
  CALDERA_CHECK(id >= 0, DataError,
                "template {} needs the control token \"{}\", which the tokenizer does not have; choose a "
                "template that the "
                "language model was trained with",
                conversation.name, token);
  return id;
}

// Ids and labels of a rendered conversation. Adjacent text is tokenised as one string; a token belongs to the
// segment in which it begins, so one that reaches from a question into its answer is not learned (nor could
// the answer begin so).
class Encoder {
 public:
  Encoder(const ConversationTemplate& conversation, const Tokenizer& tokenizer)
      : conversation_(conversation), tokenizer_(tokenizer) {
    if (tokenizer.adds_bos()) put(tokenizer.bos_id(), false);
  }

  TokenizedSample encode(const std::vector<Segment>& segments) {
    for (const Segment& segment : segments) {
      if (segment.kind == Segment::Kind::kText) {
        run_ += segment.text;
        ends_.push_back({run_.size(), segment.supervised});
        continue;
      }
      flush();
      if (segment.kind == Segment::Kind::kImage) {
        put(kImageTokenIndex, false);
        context_ = TextContext::kStart;
      } else {
        const int64_t id = control_id(segment.text, conversation_, tokenizer_);
        put(id, segment.supervised);
        context_ = TextContext::kAfterControl;
        strips_ = tokenizer_.takes_space_behind(id);
      }
    }
    flush();
    return std::move(sample_);
  }

 private:
  struct End {
    size_t offset;
    bool supervised;
  };
  void put(int64_t id, bool supervised) {
    sample_.input_ids.push_back(id);
    sample_.labels.push_back(supervised ? id : kIgnoreIndex);
  }
  void flush() {
    size_t segment = 0, begin = 0;
    if (strips_) begin = run_.size() - python_strip(run_ + ".").size() + 1;
    strips_ = false;
    for (const Token& token : tokenizer_.encode(std::string_view(run_).substr(begin), context_)) {
      while (segment + 1 < ends_.size() && begin + static_cast<size_t>(token.begin) >= ends_[segment].offset)
        ++segment;
      put(token.id, ends_[segment].supervised);
    }
    run_.clear();
    ends_.clear();
  }

  const ConversationTemplate& conversation_;
  const Tokenizer& tokenizer_;
  TextContext context_ = TextContext::kStart;
  bool strips_ = false;    // white space that begins the text to come
  std::string run_;        // text not yet tokenised
  std::vector<End> ends_;  // where its segments end
  TokenizedSample sample_;
};

}  // namespace

TokenizedSample tokenize(const Record& record, const ConversationTemplate& conversation,
                         const Tokenizer& tokenizer) {
  const std::vector<Turn> turns = record.images.size() > 1 ? record.turns : image_first(record.turns);
  return Encoder(conversation, tokenizer).encode(conversation.render(turns, false));
}

std::vector<int64_t> tokenize_prompt(const std::vector<Turn>& turns, const ConversationTemplate& conversation,
                                     const Tokenizer& tokenizer) {
  CALDERA_CHECK(!turns.empty() && turns.back().from_human, DataError, "a prompt must end with a human turn");
  int64_t num_images = 0;
  for (const Turn& turn : turns)
    num_images += static_cast<int64_t>(split(turn.value, kImagePlaceholder).size()) - 1;
  return Encoder(conversation, tokenizer)
      .encode(conversation.render(num_images > 1 ? turns : image_first(turns), true))
      .input_ids;
}

std::vector<int64_t> stop_ids(const ConversationTemplate& conversation, const Tokenizer& tokenizer) {
  std::vector<int64_t> ids;
  for (const std::string& stop : conversation.stop_tokens) {
    int64_t id = tokenizer.token_id(stop);
    if (id < 0) {
      // Plain text that ends an answer ("\n", "###"): the token it begins with in the middle of a text.
      for (const Token& token : tokenizer.encode("a" + stop)) {
        if (token.begin >= 1) {
          id = token.id;
          break;
        }
      }
    }
    if (id >= 0) ids.push_back(id);
  }
  return ids;
}

std::vector<std::string> stop_texts(const ConversationTemplate& conversation, const Tokenizer& tokenizer) {
  std::vector<std::string> texts;
  for (const std::string& stop : conversation.stop_tokens) {
    const int64_t id = tokenizer.token_id(stop);
    const bool is_control = id >= 0 && tokenizer.decode(std::span(&id, 1)).empty();
    if (!is_control) texts.push_back(stop);
  }
  return texts;
}

}  // namespace caldera
