#include "eval/answer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "eval/model_session.h"
#include "tests/aten.h"
#include "tests/eval/tiny_model.h"

namespace caldera {
namespace {

// The session's tokenizer, but one of its ids stands for other letters.
class Renamed : public Tokenizer {
 public:
  Renamed(std::shared_ptr<const Tokenizer> tokenizer, int64_t id, std::string text)
      : tokenizer_(std::move(tokenizer)), id_(id), text_(std::move(text)) {}
  std::string decode(std::span<const int64_t> ids) const override {
    std::string text;
    for (const int64_t id : ids) text += id == id_ ? text_ : fmt::format("[{}]", id);
    return text;
  }
  std::vector<Token> encode(std::string_view text, TextContext context) const override {
    return tokenizer_->encode(text, context);
  }
  int64_t token_id(std::string_view token) const override { return tokenizer_->token_id(token); }
  int64_t vocab_size() const override { return tokenizer_->vocab_size(); }
  int64_t bos_id() const override { return tokenizer_->bos_id(); }
  int64_t eos_id() const override { return tokenizer_->eos_id(); }
  int64_t pad_id() const override { return tokenizer_->pad_id(); }
  bool adds_bos() const override { return tokenizer_->adds_bos(); }
  const std::string& chat_template() const override { return tokenizer_->chat_template(); }
  int64_t save(const fs::path&, const std::string&, bool) const override { return -1; }
  GgufFields gguf_fields(int64_t) const override { return {}; }

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  int64_t id_;
  std::string text_;
};

class Answer : public ::testing::Test {
 protected:
  Answer() {
    write_tiny_model(folder_.path() / "model");
    session_ =
        std::make_unique<ModelSession>(open_model({.model = folder_.path() / "model", .device = "cpu"}));
  }
  std::vector<std::string> answers(const std::vector<std::string>& questions, const AnswerOptions& options) {
    std::vector<Record> records;
    for (const std::string& question : questions)
      records.push_back({.id = "r", .images = {}, .turns = {{true, question}}, .type = ""});
    return answer_records(*session_->model, records, folder_.path(), session_->format, options);
  }
  // Leaves its answer room for three tokens: everything but the question is what the empty one takes.
  std::string long_question() {
    const SampleFormat& format = session_->format;
    const size_t rest = make_prompt("r", {{true, "x"}}, {}, format).input_ids.size() - 1;
    return std::string(static_cast<size_t>(format.model_max_length) - 3 - rest, 'x');
  }
  TemporaryFolder folder_;
  std::unique_ptr<ModelSession> session_;
};

TEST_F(Answer, IsTheSameAloneAndBesideALongPrompt) {
  // An id for each token, so that lengths can be told from the words.
  session_->format.tokenizer = std::make_shared<Renamed>(session_->format.tokenizer, -1, "");
  for (const double temperature : {0.0, 1.0}) {
    const AnswerOptions options{.max_new_tokens = 12, .temperature = temperature, .seed = 3};
    const std::string alone = answers({"Hello?"}, options)[0];
    const std::vector<std::string> together = answers({"Hello?", long_question()}, options);
    EXPECT_EQ(together[0], alone);
    EXPECT_GT(std::count(alone.begin(), alone.end(), '['), 3);
    EXPECT_LE(std::count(together[1].begin(), together[1].end(), '['), 3);
    // One batch for each record, and one for all.
    AnswerOptions apart = options;
    apart.max_tokens_per_batch = 1;
    EXPECT_EQ(answers({"Hello?", long_question()}, apart), together);
  }
}

TEST_F(Answer, EndsAtTheTemplatesTextWhereverATokenHoldsIt) {
  const auto bytes = session_->format.tokenizer;
  session_->format.conversation = &find_template("plain");
  const std::vector<Turn> turns = {{.from_human = true, .value = "<image>"}};
  const std::vector<at::Tensor> pixels = {at::full({3, 32, 32}, 90, at::kByte)};
  std::vector<int64_t> ids;
  GenerateOptions free{.max_new_tokens = 6, .banned_ids = {'\n', 256, 257, 258}};
  ids = generate(*session_->model, pack({make_prompt("r", turns, pixels, session_->format)}), free)[0];
  ASSERT_EQ(ids.size(), 6u);
  const auto place = std::find(ids.begin(), ids.end(), ids[3]);
  std::string expected;
  for (auto id = ids.begin(); id != place; ++id) expected += fmt::format("[{}]", *id);
  session_->format.tokenizer = std::make_shared<Renamed>(bytes, *place, ".\nand more");
  EXPECT_EQ(answer(*session_->model, turns, pixels, session_->format, {.max_new_tokens = 6}), expected + ".");
}

}  // namespace
}  // namespace caldera
