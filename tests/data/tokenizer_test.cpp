#include "data/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <thread>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/words.h"
#include "data/template.h"
#include "data/tokenizers/byte_level_bpe.h"
#include "data/tokenizers/nfc.h"
#include "data/tokenizers/sentencepiece_model.h"
#include "data/tokenizers/utf8.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<int64_t> ids_of_tokens(const std::vector<Token>& tokens) {
  std::vector<int64_t> ids;
  for (const Token& token : tokens) ids.push_back(token.id);
  return ids;
}

// A folder of its own for each test, gone afterwards.
class TokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / fmt::format("caldera-tokenizer-{}", getpid());
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  // A copy of the small SentencePiece tokenizer with the given configuration.
  fs::path sentencepiece(const Json& config) {
    fs::copy_file(kGolden / "text_sentencepiece/tokenizer.model", folder_ / "tokenizer.model",
                  fs::copy_options::overwrite_existing);
    write_json(folder_ / "tokenizer_config.json", config);
    return folder_;
  }
  void expect_load_error(const fs::path& path, const std::string& what) {
    try {
      load_tokenizer(path);
      FAIL() << "expected an error with: " << what;
    } catch (const CheckpointError& error) {
      EXPECT_THAT(error.what(), HasSubstr(what));
    }
  }
  fs::path folder_;
};

// Every token's bytes lie within the text and in order, and tokens that are plain text spell out what they
// cover.
void expect_sound_offsets(const std::string& text, const std::vector<Token>& tokens) {
  int64_t last = 0;
  for (const Token& token : tokens) {
    EXPECT_GE(token.begin, last) << text;
    EXPECT_LE(token.begin, token.end) << text;
    last = token.begin;
  }
  if (!tokens.empty()) {
    EXPECT_EQ(tokens.back().end, static_cast<int64_t>(text.size())) << text;
  }
}

TEST_F(TokenizerTest, SentencePieceGivesHfsIds) {
  for (const bool legacy : {true, false}) {
    const auto tokenizer = load_tokenizer(sentencepiece({{"legacy", legacy}}));
    const Json golden = read_json(kGolden / (legacy ? "text_labels_legacy.json" : "text_labels_new.json"));
    for (const Json& line : golden["lines"]) {
      const auto text = line["text"].get<std::string>();
      const auto tokens = tokenizer->encode(text);
      EXPECT_EQ(ids_of_tokens(tokens), line["ids"].get<std::vector<int64_t>>())
          << "legacy " << legacy << ": " << text;
      expect_sound_offsets(text, tokens);
    }
  }
}

TEST_F(TokenizerTest, LegacyIsWhatAbsenceMeansAndPutsAPrefixAfterControlTokens) {
  const auto pieces = [](const Tokenizer& tokenizer, TextContext context) {
    return tokenizer.encode("USER", context).size();
  };
  const auto legacy = load_tokenizer(sentencepiece(Json::object()));
  EXPECT_EQ(pieces(*legacy, TextContext::kStart), 2);  // "▁US" "ER"
  EXPECT_EQ(pieces(*legacy, TextContext::kAfterControl), 2);
  const auto newer = load_tokenizer(sentencepiece({{"legacy", false}}));
  EXPECT_EQ(pieces(*newer, TextContext::kStart), 2);
  EXPECT_EQ(pieces(*newer, TextContext::kAfterControl), 1);  // "USER"
  // Spaces after a control token stay.
  EXPECT_THAT(ids_of_tokens(newer->encode("  USER", TextContext::kAfterControl)),
              ElementsAre(newer->token_id("▁▁"), newer->token_id("USER")));
}

TEST_F(TokenizerTest, SentencePieceKnowsItsControlTokens) {
  const auto tokenizer = load_tokenizer(sentencepiece({{"pad_token", "<unk>"}}));
  EXPECT_EQ(tokenizer->bos_id(), 1);
  EXPECT_EQ(tokenizer->eos_id(), 2);
  EXPECT_EQ(tokenizer->pad_id(), 0);
  EXPECT_EQ(tokenizer->token_id("</s>"), 2);
  EXPECT_EQ(tokenizer->token_id("<image>"), -1);
  EXPECT_EQ(tokenizer->token_id("no such token"), -1);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(load_tokenizer(sentencepiece(Json::object()))->pad_id(), -1);
  EXPECT_FALSE(load_tokenizer(sentencepiece({{"add_bos_token", false}}))->adds_bos());
}

TEST_F(TokenizerTest, DecodingGivesTheTextBackWithoutControlTokens) {
  const std::string text = "The small cat café 🦄 is 12 years old.\n  End";
  for (const bool legacy : {true, false}) {
    const auto tokenizer = load_tokenizer(sentencepiece({{"legacy", legacy}}));
    auto ids = ids_of_tokens(tokenizer->encode(text));
    ids.insert(ids.begin(), 1);
    ids.push_back(2);
    ids.push_back(kImageTokenIndex);
    ids.push_back(1 << 20);
    EXPECT_EQ(tokenizer->decode(ids), text);
  }
  const auto bpe = load_tokenizer(kGolden / "text_bpe_smollm");
  auto ids = ids_of_tokens(bpe->encode(text));
  ids.push_back(bpe->eos_id());
  EXPECT_EQ(bpe->decode(ids), text);
}

TEST_F(TokenizerTest, ByteLevelBpeGivesHfsIds) {
  const Json golden = read_json(kGolden / "text_bpe.json");
  for (const char* kind : {"smollm", "qwen2", "llama3"}) {
    const auto tokenizer = load_tokenizer(kGolden / (std::string("text_bpe_") + kind));
    for (size_t i = 0; i < golden["lines"].size(); ++i) {
      const auto text = golden["lines"][i].get<std::string>();
      const auto tokens = tokenizer->encode(text);
      EXPECT_EQ(ids_of_tokens(tokens), golden[kind][i].get<std::vector<int64_t>>()) << kind << ": " << text;
      expect_sound_offsets(text, tokens);
    }
  }
}

TEST_F(TokenizerTest, WhetherBosIsAddedComesFromThePostProcessor) {
  EXPECT_FALSE(load_tokenizer(kGolden / "text_bpe_smollm")->adds_bos());
  const auto tokenizer = load_tokenizer(kGolden / "text_bpe_llama3");
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->bos_id(), tokenizer->token_id("<s>"));
}

TEST_F(TokenizerTest, TextNeverBecomesAControlToken) {
  for (const char* name : {"text_sentencepiece", "text_bpe_smollm", "text_bpe_llama3"}) {
    const auto tokenizer = load_tokenizer(kGolden / name);
    for (const char* text : {"<s>", "</s>", "<unk>", "<|im_end|>", "<|im_start|>", "<image>"}) {
      const auto ids = ids_of_tokens(tokenizer->encode(text));
      EXPECT_GT(ids.size(), 1) << name << " " << text;
      EXPECT_EQ(tokenizer->decode(ids), text) << name;
    }
  }
}

TEST_F(TokenizerTest, BrokenUtf8BecomesReplacementCharactersAtTheirPlaces) {
  const std::string broken = "a\xC3 b\xFF";
  const auto tokenizer = load_tokenizer(kGolden / "text_bpe_smollm");
  const auto tokens = tokenizer->encode(broken);
  EXPECT_EQ(tokenizer->decode(ids_of_tokens(tokens)), "a\uFFFD b\uFFFD");
  expect_sound_offsets(broken, tokens);
  const auto pieces = load_tokenizer(kGolden / "text_sentencepiece");
  EXPECT_EQ(pieces->decode(ids_of_tokens(pieces->encode(broken))), "a\uFFFD b\uFFFD");
}

TEST_F(TokenizerTest, SavedFoldersLoadAsTheSameTokenizerWithAnImageToken) {
  const std::string text = "USER: The café 🦄 has 12 chairs. <image> </s>";
  for (const char* name : {"text_sentencepiece", "text_bpe_smollm", "text_bpe_qwen2", "text_bpe_llama3"}) {
    const auto tokenizer = load_tokenizer(kGolden / name);
    const int64_t image_id = tokenizer->save(folder_ / name, "{{ 'chat' }}");
    EXPECT_EQ(image_id, tokenizer->vocab_size()) << name;
    const auto saved = load_tokenizer(folder_ / name);
    EXPECT_EQ(saved->token_id("<image>"), image_id) << name;
    EXPECT_EQ(saved->vocab_size(), image_id + 1) << name;
    EXPECT_EQ(saved->bos_id(), tokenizer->bos_id());
    EXPECT_EQ(saved->eos_id(), tokenizer->eos_id());
    EXPECT_EQ(saved->pad_id(), tokenizer->pad_id());
    EXPECT_EQ(saved->adds_bos(), tokenizer->adds_bos());
    EXPECT_EQ(saved->chat_template(), "{{ 'chat' }}");
    EXPECT_EQ(ids_of_tokens(saved->encode(text)), ids_of_tokens(tokenizer->encode(text))) << name;
    // Once more: nothing is added twice.
    EXPECT_EQ(saved->save(folder_ / "again", ""), image_id) << name;
    EXPECT_EQ(load_tokenizer(folder_ / "again")->vocab_size(), image_id + 1) << name;
    fs::remove_all(folder_ / "again");
  }
}

TEST_F(TokenizerTest, ASavedSentencePieceModelHasATokenizerJsonWhoseMergesFollowScores) {
  const auto tokenizer = load_tokenizer(kGolden / "text_sentencepiece");
  tokenizer->save(folder_, "");
  const std::string json = read_file(folder_ / "tokenizer.json");
  // Of the golden model's best-scored pieces: "▁▁" is 10, "USER" is 1 ("US" "ER" is the only way to make it).
  EXPECT_LT(json.find("\"▁ ▁\""), json.find("\"US ER\""));
  EXPECT_NE(json.find("\"US ER\""), std::string::npos);
  // Read without its model, it cuts texts the same.
  fs::remove(folder_ / "tokenizer.model");
  const std::string text = "USER: The café 🦄 has  12 chairs.\n";
  EXPECT_EQ(ids_of_tokens(load_tokenizer(folder_)->encode(text)), ids_of_tokens(tokenizer->encode(text)));
}

TEST_F(TokenizerTest, ThreadsShareATokenizer) {
  const Json golden = read_json(kGolden / "text_bpe.json");
  const auto tokenizer = load_tokenizer(kGolden / "text_bpe_smollm");
  std::vector<int> mismatches(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < mismatches.size(); ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < golden["lines"].size(); ++i) {
        const auto ids = ids_of_tokens(tokenizer->encode(golden["lines"][i].get<std::string>()));
        if (ids != golden["smollm"][i].get<std::vector<int64_t>>()) ++mismatches[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(mismatches, ElementsAre(0, 0, 0, 0));
}

TEST_F(TokenizerTest, LongWordsAreNotQuadratic) {
  const auto tokenizer = load_tokenizer(kGolden / "text_bpe_smollm");
  const std::string text(200000, 'a');
  EXPECT_EQ(tokenizer->decode(ids_of_tokens(tokenizer->encode(text))), text);
}

TEST_F(TokenizerTest, LoadingErrorsSayWhatWasLookedFor) {
  expect_load_error(folder_ / "nowhere", "no such file or folder");
  expect_load_error(folder_, "expected tokenizer.model (SentencePiece) or tokenizer.json");
  write_file_atomic(folder_ / "file", "not GGUF");
  expect_load_error(folder_ / "file", "not a GGUF file");
  write_file_atomic(folder_ / "tokenizer.json", "{");
  expect_load_error(folder_, "not a tokenizer.json");
}

TEST_F(TokenizerTest, TokenizerJsonErrorsNameWhatIsNotSupported) {
  const Json good = {
      {"added_tokens", Json::array()},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
      {"post_processor", nullptr},
      {"model",
       {{"type", "BPE"}, {"vocab", {{"a", 0}, {"b", 1}, {"ab", 2}}}, {"merges", Json::array({"a b"})}}}};
  const auto with = [&](const char* pointer, const Json& value) {
    Json changed = good;
    changed[Json::json_pointer(pointer)] = value;
    write_json(folder_ / "tokenizer.json", changed);
    return folder_;
  };
  EXPECT_EQ(load_tokenizer(with("/version", "1.0"))->vocab_size(), 3);
  expect_load_error(with("/model/byte_fallback", true), "its pre_tokenizer \"ByteLevel\" is not supported");
  expect_load_error(with("/model/type", "Unigram"), "its model is \"Unigram\"");
  expect_load_error(with("/model/dropout", 0.1), "its model's dropout is not supported");
  expect_load_error(with("/model/vocab/b", 0), "two tokens have the id 0");
  expect_load_error(with("/model/vocab/b", -1), "token id -1 is out of range");
  expect_load_error(with("/model/vocab/b", "one"), "not a tokenizer.json");
  expect_load_error(with("/model/merges/0", "a c"), "a merge names \"c\"");
  expect_load_error(with("/model/merges/0", "ab"), "is not a pair");
  expect_load_error(with("/model/merges/0", "b a"), "makes \"ba\", which is not in the vocabulary");
  expect_load_error(with("/normalizer", {{"type", "Lowercase"}}),
                    "its normalizer \"Lowercase\" is not supported");
  expect_load_error(with("/pre_tokenizer/add_prefix_space", true), "adds a space before the text");
  expect_load_error(with("/pre_tokenizer/type", "Whitespace"),
                    "its pre_tokenizer \"Whitespace\" is not supported");
  expect_load_error(with("/pre_tokenizer", nullptr), "no ByteLevel step");
  const auto split = [](const char* pattern, const char* behavior) {
    return Json{
        {"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", behavior}, {"invert", false}};
  };
  const auto sequence = [](const Json& first) {
    return Json{
        {"type", "Sequence"},
        {"pretokenizers", Json::array({first, {{"type", "ByteLevel"}, {"add_prefix_space", false}}})}};
  };
  expect_load_error(with("/pre_tokenizer", sequence(split("(", "Isolated"))), "cannot be compiled");
  expect_load_error(with("/pre_tokenizer", sequence(split("a", "MergedWithNext"))),
                    "its Split \"MergedWithNext\" is not supported");
  write_json(folder_ / "tokenizer_config.json", {{"eos_token", "</s>"}});
  expect_load_error(with("/version", "1.0"), "\"</s>\" of its configuration is not in the vocabulary");
}

TEST_F(TokenizerTest, ConfigurationErrorsNameTheField) {
  expect_load_error(sentencepiece({{"bos_token", 3}}), "bos_token: expected a token's text");
  expect_load_error(sentencepiece({{"bos_token", "<bos>"}}),
                    "\"<bos>\" of its configuration is neither a piece nor");
  expect_load_error(sentencepiece({{"added_tokens_decoder", {{"x", 1}}}}), "\"x\" is not a token id");
  expect_load_error(sentencepiece({{"added_tokens_decoder", {{"99999999", {{"content", "a"}}}}}}),
                    "out of range");
  expect_load_error(sentencepiece({{"added_tokens_decoder", {{"5", "a"}}}}), "token 5 has no text");
  write_json(sentencepiece(Json::object()) / "added_tokens.json", {{"<image>", "x"}});
  expect_load_error(folder_, "\"<image>\": expected a token id");
  write_json(folder_ / "added_tokens.json", {{"<image>", 3000}});
  EXPECT_EQ(load_tokenizer(folder_)->token_id("<image>"), 3000);
  EXPECT_EQ(load_tokenizer(folder_)->vocab_size(), 3001);
}

TEST_F(TokenizerTest, DamagedSentencePieceModelsAreRefusedNotLoaded) {
  const std::string model = read_file(kGolden / "text_sentencepiece/tokenizer.model");
  EXPECT_TRUE(check_sentencepiece_model(model, "model").is_bpe);
  // Cut off anywhere, it is an error or still a sound (shorter) model; never a crash.
  for (size_t length = 0; length < model.size(); length += 97) {
    try {
      check_sentencepiece_model(std::string_view(model).substr(0, length), "model");
    } catch (const CheckpointError& error) {
      EXPECT_THAT(error.what(), HasSubstr("model: "));
    }
  }
  const auto expect_refused = [](const std::string& bytes, const char* what) {
    EXPECT_THAT([&] { check_sentencepiece_model(bytes, "model"); },
                testing::ThrowsMessage<CheckpointError>(HasSubstr(what)));
  };
  const std::string unknown = make_sentencepiece_model({{"<unk>", 0, PieceType::kUnknown}}, true);
  check_sentencepiece_model(unknown, "model");
  expect_refused("", "no pieces");
  expect_refused("\x0a\x7f", "a field reaches beyond the end");
  expect_refused("\x0a", "cut off inside a number");
  expect_refused(std::string(11, '\xff'), "longer than 64 bits");
  expect_refused(std::string("\x00\x00", 2), "a field number is zero");
  expect_refused("\x0b", "unknown wire type");
  expect_refused("\x08\x01", "wrong wire type");
  expect_refused(make_sentencepiece_model({{"", 0, PieceType::kUnknown}}, true), "a piece is empty");
  expect_refused(make_sentencepiece_model({{"\xff", 0, PieceType::kUnknown}}, true), "a piece is not text");
  expect_refused(make_sentencepiece_model({{"a", 0, PieceType::kUnknown}, {"a"}}, true),
                 "a piece occurs twice");
  expect_refused(make_sentencepiece_model({{"a"}}, true), "not exactly one unknown piece");
  expect_refused(make_sentencepiece_model({{"a", 0, static_cast<PieceType>(9)}}, true), "unknown type");
  expect_refused(unknown + std::string("\x12\x02\x18\x03", 4), "model type 3 is not supported");
  expect_refused(unknown + std::string("\x1a\x04\x12\x02zz", 6), "a normalisation table is not supported");
}

TEST(Utf8Test, BrokenSequencesAreReplacedAsPythonDoes) {
  EXPECT_EQ(repair_utf8("ok é").text, "ok é");
  EXPECT_EQ(repair_utf8("a\xE2\x82z").text, "a\uFFFDz");              // a cut sequence is one
  EXPECT_EQ(repair_utf8("\xC0\xAF").text, "\uFFFD\uFFFD");            // overlong
  EXPECT_EQ(repair_utf8("\xED\xA0\x80").text, "\uFFFD\uFFFD\uFFFD");  // a surrogate
  EXPECT_EQ(repair_utf8("\xF4\x90\x80\x80").text, "\uFFFD\uFFFD\uFFFD\uFFFD");
}

TEST(NfcTest, ComposesAsUnicodeSays) {
  const auto nfc = [](const char* text) { return compose_nfc({text, {}}); };
  EXPECT_EQ(nfc("e\u0301 A\u030A").text, "\u00E9 \u00C5");
  EXPECT_EQ(nfc("\u212B").text, "\u00C5");                // a singleton
  EXPECT_EQ(nfc("\u1112\u1161\u11AB").text, "\uD55C");    // Hangul
  EXPECT_EQ(nfc("q\u0307\u0323").text, "q\u0323\u0307");  // canonical order
  EXPECT_EQ(nfc("\u0958").text, "\u0915\u093C");          // excluded from composition
  EXPECT_EQ(nfc("\u0301x").text, "\u0301x");
  // The accent belongs to its letter: offsets point into the text as it was.
  const MappedText mapped = nfc("e\u0301x");
  EXPECT_THAT(mapped.origin, ElementsAre(0, 0, 3, 4));
}

TEST(WordSplitterTest, PatternsCutTextsAndLeaveNothingOut) {
  const auto words = [](std::vector<SplitStep> steps, const std::string& text) {
    std::vector<std::string> parts;
    for (const auto& [begin, end] : WordSplitter(steps, "test").split(text))
      parts.push_back(text.substr(begin, end - begin));
    return parts;
  };
  EXPECT_THAT(words({{SplitStep::Kind::kByteLevel, ""}}, "It's  12 cats!"),
              ElementsAre("It", "'s", " ", " 12", " cats", "!"));
  EXPECT_THAT(words({{SplitStep::Kind::kDigits, ""}, {SplitStep::Kind::kByteLevel, ""}}, "a 12"),
              ElementsAre("a", " ", "1", "2"));
  EXPECT_THAT(words({{SplitStep::Kind::kSplit, "b*"}}, "aébbc"), ElementsAre("aé", "bb", "c"));
  EXPECT_THAT(words({}, "whole"), ElementsAre("whole"));
}

// Not a test of its own: tests/parity/tokens.py runs it to compare with other programs. CALDERA_TOKENS_JOB
// names a JSON file
// {"tokenizer", "lines": [text], "save": folder, "template", "conversations": [[value]], "out": file}.
TEST(TokenizerJob, AnswersTheParityScript) {
  const char* file = std::getenv("CALDERA_TOKENS_JOB");
  if (file == nullptr) GTEST_SKIP() << "runs for tests/parity/tokens.py alone";
  const Json job = read_json(file);
  const auto tokenizer = load_tokenizer(job["tokenizer"].get<std::string>());
  Json out = {{"lines", Json::array()}, {"prompts", Json::array()}, {"samples", Json::array()}};
  for (const Json& line : job["lines"])
    out["lines"].push_back(ids_of_tokens(tokenizer->encode(line.get<std::string>())));
  const ConversationTemplate& conversation = find_template(job["template"].get<std::string>());
  if (job.contains("save"))
    out["image_id"] = tokenizer->save(job["save"].get<std::string>(), conversation.jinja);
  for (const Json& values : job["conversations"]) {
    Record record;
    for (const Json& value : values)
      record.turns.push_back({record.turns.size() % 2 == 0, value.get<std::string>()});
    if (values[0].get<std::string>().find(kImagePlaceholder) != std::string::npos)
      record.images = {"image.png"};
    const TokenizedSample sample = tokenize(record, conversation, *tokenizer);
    out["samples"].push_back({{"ids", sample.input_ids}, {"labels", sample.labels}});
    std::string text;
    for (const Segment& segment : conversation.render(record.turns, false)) text += segment.text;
    record.turns.pop_back();
    std::string prompt;
    for (const Segment& segment : conversation.render(record.turns, true)) prompt += segment.text;
    out["prompts"].push_back({text, prompt});
  }
  write_file_atomic(job["out"].get<std::string>(), json_line(out));
}

}  // namespace
}  // namespace caldera
