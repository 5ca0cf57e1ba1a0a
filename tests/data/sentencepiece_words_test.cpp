// Words cut into pieces one by one, against the library's view of whole texts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "base/files.h"
#include "base/rng.h"
#include "data/tokenizers/factories.h"
#include "data/tokenizers/sentencepiece_model.h"
#include "data/tokenizers/word_cache.h"
#include "tests/support.h"

namespace caldera {
namespace {

const fs::path kSentencePieceGolden = kGolden / "text_sentencepiece/tokenizer.model";


// A piece in a model's format; appended to a model, it is one of the model's pieces.
std::string piece_bytes(const std::string& text, PieceType type) {
  const std::string message = "\x0a" + std::string(1, static_cast<char>(text.size())) + text +
                              std::string("\x15\0\0\0\0\x18", 6) + static_cast<char>(type);
  return "\x0a" + std::string(1, static_cast<char>(message.size())) + message;
}

std::unique_ptr<Tokenizer> tokenizer_of(const std::string& model, bool legacy) {
  TokenizerConfig config;
  config.fields["legacy"] = legacy;
  return make_sentencepiece_tokenizer(model, config, "model");
}

// Words of the golden model's language and of none, single and many spaces, line breaks, signs of all widths.
std::string random_text(Rng& rng) {
  static const std::vector<std::string> parts = {" ",
                                                 " ",
                                                 " ",
                                                 "  ",
                                                 "     ",
                                                 "\n",
                                                 "\t",
                                                 "▁",
                                                 "USER: ",
                                                 "the",
                                                 "cat",
                                                 "small",
                                                 "is",
                                                 "a",
                                                 "12",
                                                 "years",
                                                 "é",
                                                 "ñandú",
                                                 "猫",
                                                 "🦄",
                                                 "<s>",
                                                 "</s>",
                                                 "</s",
                                                 ".",
                                                 "?!",
                                                 "\xC2\xA0",
                                                 "ASSISTANT:",
                                                 "old",
                                                 "\xFF",
                                                 std::string(70, ' '),
                                                 std::string(70, 'e')};
  std::string text;
  for (int64_t i = rng.between(0, 20); i > 0; --i) text += rng.pick(parts);
  return text;
}

std::vector<std::tuple<int64_t, int64_t, int64_t>> values_of(const std::vector<Token>& tokens) {
  std::vector<std::tuple<int64_t, int64_t, int64_t>> values;
  for (const Token& token : tokens) values.emplace_back(token.id, token.begin, token.end);
  return values;
}

TEST(SentencePieceWordsTest, GiveTheWholeTextsPiecesAndPlaces) {
  const std::string model = read_file(kSentencePieceGolden);
  // A piece that is matched before merging, and that no text holds: the library sees whole texts.
  const std::string whole_model = model + piece_bytes("\uE000\uE001", PieceType::kUserDefined);
  ASSERT_TRUE(check_sentencepiece_model(model, "model").has_separate_words);
  ASSERT_FALSE(check_sentencepiece_model(whole_model, "model").has_separate_words);
  for (const bool legacy : {true, false}) {
    const auto by_words = tokenizer_of(model, legacy), whole = tokenizer_of(whole_model, legacy);
    Rng rng(1, legacy, 0);
    for (int i = 0; i < 3000; ++i) {
      const std::string text = random_text(rng);
      for (const TextContext context : {TextContext::kStart, TextContext::kAfterControl})
        EXPECT_EQ(values_of(by_words->encode(text, context)), values_of(whole->encode(text, context)))
            << "legacy " << legacy << ": \"" << text << '"';
    }
  }
}

TEST(SentencePieceWordsTest, AModelWithoutDummyPrefixGetsNone) {
  const std::string model = read_file(kSentencePieceGolden) + std::string(kWithoutDummyPrefix);
  const auto tokenizer = tokenizer_of(model, /*legacy=*/true);
  EXPECT_EQ(values_of(tokenizer->encode("USER", TextContext::kStart)),
            values_of(tokenizer_of(read_file(kSentencePieceGolden), false)->encode("USER", TextContext::kAfterControl)));
}

TEST(SentencePieceWordsTest, APieceThatReachesIntoTheNextWordIsFound) {
  const std::string model = make_sentencepiece_model(
      {{"<unk>", 0, PieceType::kUnknown}, {"▁", -9}, {"a", -9}, {"b", -9}, {"a▁", -2}, {"a▁b", -1}}, false);
  EXPECT_FALSE(check_sentencepiece_model(model, "model").has_separate_words);
  EXPECT_EQ(values_of(tokenizer_of(model, true)->encode("a b", TextContext::kStart)),
            (std::vector<std::tuple<int64_t, int64_t, int64_t>>{{5, 0, 3}}));
}

TEST(SentencePieceWordsTest, ModelsThatTreatSpacesOtherwiseAreSeenWhole) {
  const std::vector<Piece> pieces = {{"<unk>", 0, PieceType::kUnknown}, {"▁", -1}, {"a", -2}, {"▁▁", -3}};
  const std::string model = make_sentencepiece_model(pieces, true);
  const auto separate = [](const std::string& bytes) {
    return check_sentencepiece_model(bytes, "model").has_separate_words;
  };
  EXPECT_TRUE(separate(model));  // a run of spaces is one word's
  EXPECT_FALSE(separate(model + piece_bytes("▁a▁", PieceType::kNormal)));
  EXPECT_FALSE(separate(model + piece_bytes("x", PieceType::kUserDefined)));
  EXPECT_FALSE(separate(model + std::string("\x1a\x02\x20\x01", 4)));      // extra spaces go
  EXPECT_FALSE(separate(model + std::string("\x1a\x02\x28\x00", 4)));      // spaces stay spaces
  EXPECT_FALSE(separate(model + std::string("\x12\x03\xc0\x01\x01", 5)));  // they end words
  EXPECT_FALSE(separate(model + std::string("\x12\x02\x18\x01", 4)));      // unigram
  EXPECT_FALSE(separate(make_sentencepiece_model({{"<unk>", 0, PieceType::kUnknown}, {"a"}}, true)));
  EXPECT_TRUE(check_sentencepiece_model(model, "model").add_dummy_prefix);
  EXPECT_FALSE(check_sentencepiece_model(model + std::string(kWithoutDummyPrefix), "model").add_dummy_prefix);
}

TEST(WordCacheTest, ThreadsAgreeAndAFullCacheComputesAnew) {
  const WordCache cache;
  std::vector<int> faults(4);
  std::vector<std::thread> threads;
  for (size_t t = 0; t < faults.size(); ++t) {
    threads.emplace_back([&, t] {
      std::vector<WordToken> computed;
      for (int32_t i = 0; i < 300000; ++i) {  // more than there is room for
        const std::string word = std::to_string(i / 2);
        const auto& tokens = cache.find_or(word, computed, [&](std::string_view w) {
          return std::vector<WordToken>{{std::stoi(std::string(w)), 0, static_cast<int32_t>(w.size())}};
        });
        if (tokens.size() != 1 || tokens[0].id != i / 2 || tokens[0].end != static_cast<int32_t>(word.size()))
          ++faults[t];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(faults, testing::Each(0));
}

TEST(WordCacheTest, KeepsWordsButNoLongOnes) {
  const WordCache cache;
  int num_computed = 0;
  std::vector<WordToken> computed;
  const auto look_up = [&](const std::string& word) {
    cache.find_or(word, computed, [&](std::string_view) {
      ++num_computed;
      return std::vector<WordToken>{{1, 0, 1}};
    });
  };
  look_up("word");
  look_up("word");
  EXPECT_EQ(num_computed, 1);
  look_up(std::string(65, 'x'));
  look_up(std::string(65, 'x'));
  EXPECT_EQ(num_computed, 3);
}

}  // namespace
}  // namespace caldera
