// The tokenizers inside GGUF files, on small files written here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "data/tokenizer.h"
#include "data/tokenizers/byte_level_bpe.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;


// A GGUF file (version 3) of metadata alone.
class GgufWriter {
 public:
  GgufWriter& string(const std::string& key, const std::string& value) { return entry(key, 8).text(value); }
  GgufWriter& boolean(const std::string& key, bool value) { return entry(key, 7).number<uint8_t>(value); }
  GgufWriter& integer(const std::string& key, uint32_t value) { return entry(key, 4).number(value); }
  GgufWriter& strings(const std::string& key, const std::vector<std::string>& values) {
    entry(key, 9).number<uint32_t>(8).number<uint64_t>(values.size());
    for (const std::string& value : values) text(value);
    return *this;
  }
  template <class T>
  GgufWriter& numbers(const std::string& key, uint32_t type, const std::vector<T>& values) {
    entry(key, 9).number<uint32_t>(type).template number<uint64_t>(values.size());
    for (const T value : values) number(value);
    return *this;
  }
  void write(const fs::path& path) const {
    GgufWriter header;
    header.bytes_ = "GGUF";
    header.number<uint32_t>(3).number<uint64_t>(0).number<uint64_t>(num_entries_);
    write_file_atomic(path, header.bytes_ + bytes_);
  }

 private:
  GgufWriter& entry(const std::string& key, uint32_t type) {
    ++num_entries_;
    return text(key).number(type);
  }
  GgufWriter& text(const std::string& value) {
    number<uint64_t>(value.size());
    bytes_ += value;
    return *this;
  }
  template <class T>
  GgufWriter& number(T value) {
    char raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));
    bytes_.append(raw, sizeof(T));
    return *this;
  }
  std::string bytes_;
  uint64_t num_entries_ = 0;
};

class GgufTokenizerTest : public testing::Test {
 protected:
  void SetUp() override { file_ = fs::temp_directory_path() / fmt::format("caldera-{}.gguf", getpid()); }
  void TearDown() override { fs::remove(file_); }
  std::unique_ptr<Tokenizer> load(const GgufWriter& writer) {
    writer.write(file_);
    return load_tokenizer(file_);
  }
  void expect_error(const GgufWriter& writer, const std::string& what) {
    EXPECT_THAT([&] { load(writer); }, testing::ThrowsMessage<CheckpointError>(HasSubstr(what)));
  }
  fs::path file_;
};

std::vector<int64_t> ids_of(const std::vector<Token>& tokens) {
  std::vector<int64_t> ids;
  for (const Token& token : tokens) ids.push_back(token.id);
  return ids;
}

// The small SmolLM2-like tokenizer of the goldens, as llama.cpp would store it.
GgufWriter smollm(const std::string& pre = "smollm") {
  const Json json = read_json(kGolden / "text_bpe_smollm/tokenizer.json");
  std::vector<std::string> tokens(json["model"]["vocab"].size()), merges;
  for (const auto& [token, id] : json["model"]["vocab"].items()) tokens[id.get<size_t>()] = token;
  for (const Json& pair : json["model"]["merges"]) {
    merges.push_back(pair[0].get<std::string>() + " " + pair[1].get<std::string>());
  }
  std::vector<int32_t> types(tokens.size(), 1);
  for (size_t i = 0; i < 3; ++i) types[i] = 3;
  GgufWriter writer;
  writer.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", pre);
  writer.strings("tokenizer.ggml.tokens", tokens).strings("tokenizer.ggml.merges", merges);
  writer.numbers<int32_t>("tokenizer.ggml.token_type", 5, types);
  writer.integer("tokenizer.ggml.bos_token_id", 1).integer("tokenizer.ggml.eos_token_id", 2);
  return writer.string("tokenizer.chat_template", "{{ '<|im_start|>' }}");
}

TEST_F(GgufTokenizerTest, ByteLevelBpeGivesTheIdsOfItsTokenizerJson) {
  const auto tokenizer = load(smollm());
  const Json golden = read_json(kGolden / "text_bpe.json");
  for (size_t i = 0; i < golden["lines"].size(); ++i) {
    const auto text = golden["lines"][i].get<std::string>();
    EXPECT_EQ(ids_of(tokenizer->encode(text)), golden["smollm"][i].get<std::vector<int64_t>>()) << text;
  }
  EXPECT_EQ(tokenizer->eos_id(), 2);
  EXPECT_EQ(tokenizer->token_id("<|im_end|>"), 2);
  EXPECT_FALSE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->chat_template(), "{{ '<|im_start|>' }}");
}

TEST_F(GgufTokenizerTest, SentencePiecePiecesWithScores) {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<int32_t> types = {2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    tokens.push_back(fmt::format("<0x{:02X}>", byte));
    types.push_back(6);
  }
  for (const char* piece : {"ab", "▁ab", "▁", "a", "b"}) {
    tokens.emplace_back(piece);
    types.push_back(1);
  }
  std::vector<float> scores(tokens.size());
  for (size_t i = 259; i < tokens.size(); ++i) scores[i] = 258.0f - static_cast<float>(i);
  GgufWriter writer;
  writer.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", tokens);
  GgufWriter without_scores = writer;
  writer.numbers<float>("tokenizer.ggml.scores", 6, scores)
      .numbers<int32_t>("tokenizer.ggml.token_type", 5, types);
  GgufWriter without_prefix = writer;
  const auto tokenizer = load(writer);
  EXPECT_TRUE(tokenizer->adds_bos());
  EXPECT_EQ(tokenizer->bos_id(), 1);
  // "▁ab", "ab", then "é" as its two bytes.
  EXPECT_THAT(ids_of(tokenizer->encode("abab\u00e9")), ElementsAre(260, 259, 3 + 0xC3, 3 + 0xA9));
  EXPECT_THAT(ids_of(load(without_prefix.boolean("tokenizer.ggml.add_space_prefix", false))->encode("ab")),
              ElementsAre(259));
  expect_error(without_scores.numbers<float>("tokenizer.ggml.scores", 6, {1.0f}), "scores has 1 entries");
}

// Vocabularies that made other readers write outside of their tables.
TEST_F(GgufTokenizerTest, ByteTokensOfNoByteAreRefused) {
  for (const char* piece : {"<0x-1>", "<0x100>", "<0xZZ>", "<0x>", "<0x00", "byte"}) {
    std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
    std::vector<int32_t> types = {2, 3, 3};
    for (int byte = 0; byte < 256; ++byte) {
      tokens.push_back(byte == 65 ? piece : fmt::format("<0x{:02X}>", byte));
      types.push_back(6);
    }
    GgufWriter writer;
    writer.string("tokenizer.ggml.model", "llama").strings("tokenizer.ggml.tokens", tokens);
    writer.numbers<float>("tokenizer.ggml.scores", 6, std::vector<float>(tokens.size()));
    expect_error(writer.numbers<int32_t>("tokenizer.ggml.token_type", 5, types),
                 "SentencePiece cannot load it");
  }
}

TEST_F(GgufTokenizerTest, ArraysOfAnotherTypeAreRefused) {
  GgufWriter writer;
  writer.string("tokenizer.ggml.model", "gpt2");
  GgufWriter types = writer;
  expect_error(writer.numbers<int32_t>("tokenizer.ggml.tokens", 5, {1, 2}),
               "tokenizer.ggml.tokens: expected array of strings, got array of integers");
  types.strings("tokenizer.ggml.tokens", {"a"}).strings("tokenizer.ggml.merges", {});
  expect_error(types.strings("tokenizer.ggml.token_type", {"1"}),
               "tokenizer.ggml.token_type: expected array of integers, got array of strings");
  GgufWriter negative = smollm();
  expect_error(negative.integer("tokenizer.ggml.padding_token_id", static_cast<uint32_t>(-1)),
               "padding_token_id is 4294967295, but there are");
}

TEST_F(GgufTokenizerTest, ErrorsNameTheKey) {
  const auto small = [](const std::vector<std::string>& tokens, const std::vector<std::string>& merges) {
    GgufWriter writer;
    writer.string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", tokens);
    return writer.strings("tokenizer.ggml.merges", merges);
  };
  EXPECT_EQ(load(small({"a", "b", "ab"}, {"a b"}))->vocab_size(), 3);
  expect_error(smollm("unheard-of"),
               "\"unheard-of\" is not supported; known: smollm, gpt-2, qwen2, llama-bpe");
  expect_error(GgufWriter().string("tokenizer.ggml.model", "bert"),
               "\"bert\" is not supported; known: gpt2, llama");
  expect_error(small({}, {}), "tokens is empty");
  expect_error(small({"a", "a"}, {}), "occurs twice");
  expect_error(small({"a", "b"}, {"a c"}), "\"a c\" is not a pair of tokens");
  expect_error(small({"a", "b"}, {"a b"}), "makes \"ab\", which is not in the vocabulary");
  expect_error(small({"a"}, {}).integer("tokenizer.ggml.eos_token_id", 7),
               "eos_token_id is 7, but there are 1 tokens");
  expect_error(small({"a"}, {}).numbers<int32_t>("tokenizer.ggml.token_type", 5, {1, 1}),
               "2 entries for 1 tokens");
  expect_error(small({"a"}, {}).numbers<int32_t>("tokenizer.ggml.token_type", 5, {9}),
               "of the unknown type 9");
  expect_error(small({"a"}, {}).boolean("tokenizer.ggml.add_bos_token", true), "there is no bos_token");
}

}  // namespace
}  // namespace caldera
