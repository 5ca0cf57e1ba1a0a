// A tokenizer of one token a byte and a template of one word, so that tests of data need neither vocabulary
// nor prompt.
#pragma once
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/strings.h"
#include "data/dataset.h"
#include "tests/support.h"

namespace caldera {

// Ids are the bytes; "</s>" is 256.
class FakeTokenizer : public Tokenizer {
 public:
  std::vector<Token> encode(std::string_view text, TextContext) const override {
    std::vector<Token> tokens;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      tokens.push_back({static_cast<unsigned char>(text[i]), at, at + 1});
    }
    return tokens;
  }
  std::string decode(std::span<const int64_t> ids) const override {
    std::string text;
    for (const int64_t id : ids) text += static_cast<char>(id);
    return text;
  }
  int64_t token_id(std::string_view token) const override { return token == "</s>" ? 256 : -1; }
  int64_t vocab_size() const override { return 257; }
  int64_t bos_id() const override { return -1; }
  int64_t eos_id() const override { return 256; }
  int64_t pad_id() const override { return -1; }
  bool adds_bos() const override { return false; }
  const std::string& chat_template() const override { return empty_; }
  int64_t save(const std::filesystem::path&, const std::string&, bool) const override { return 257; }
  GgufFields gguf_fields(int64_t) const override { return {}; }

 private:
  std::string empty_;
};

// Human text as it is, then the answer and "</s>", both learned.
inline const ConversationTemplate kFakeTemplate = {
    "fake",
    [](const std::vector<Turn>& turns, bool) {
      std::vector<Segment> segments;
      for (const Turn& turn : turns) {
        std::vector<std::string> parts = split(turn.value, kImagePlaceholder);
        for (size_t i = 0; i < parts.size(); ++i) {
          if (i > 0) segments.push_back({Segment::Kind::kImage, "", false});
          if (!parts[i].empty()) segments.push_back({Segment::Kind::kText, parts[i], !turn.from_human});
        }
        if (!turn.from_human) segments.push_back({Segment::Kind::kControl, "</s>", true});
      }
      return segments;
    },
    {"</s>"},
    ""};

inline SampleFormat fake_format(int64_t image_size = 8, int64_t num_image_tokens = 4,
                                int64_t max_length = 1000) {
  SampleFormat format;
  format.tokenizer = std::make_shared<FakeTokenizer>();
  format.conversation = &kFakeTemplate;
  format.image_spec.image_size = image_size;
  format.image_spec.num_image_tokens = num_image_tokens;
  format.model_max_length = max_length;
  return format;
}

inline Record fake_record(const std::string& id, const std::string& question, const std::string& answer,
                          std::vector<std::string> images = {}) {
  return {id, std::move(images), {{true, question}, {false, answer}}, ""};
}

}  // namespace caldera
