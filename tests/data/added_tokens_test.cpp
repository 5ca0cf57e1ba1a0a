// Added tokens in texts, and tokenizer.json files of the SentencePiece kind. The ids are those of HF's
// `tokenizers` 0.23 for the same files.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "data/tokenizer.h"
#include "data/tokenizers/sentencepiece_model.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

std::vector<int64_t> encoded(const Tokenizer& tokenizer, const std::string& text,
                             TextContext context = TextContext::kStart) {
  std::vector<int64_t> ids;
  for (const Token& token : tokenizer.encode(text, context)) ids.push_back(token.id);
  return ids;
}

Json added(int64_t id, const char* content, const Json& flags = Json::object()) {
  Json token = {{"id", id}, {"content", content}, {"special", false}, {"normalized", false}};
  token.update(flags);
  return token;
}

Json metaspace(const char* scheme, bool split = false) {
  return {{"type", "Metaspace"}, {"replacement", "▁"}, {"prepend_scheme", scheme}, {"split", split}};
}

// What transformers saves for a small LLaMA.
Json character_json(const Json& normalizer, const Json& pre_tokenizer) {
  const std::vector<std::string> tokens = {"<unk>",  "<s>",    "</s>", "<0x0A>", "<0xC3>", "<0xA9>",
                                           "<0x3C>", "<0x3E>", "▁",    "a",      "b",      "c",
                                           "▁a",     "ab",     "▁ab",  "bc"};
  Json vocab = Json::object(), specials = Json::array();
  for (size_t id = 0; id < tokens.size(); ++id) {
    vocab[tokens[id]] = id;
    if (id < 3) specials.push_back(added(static_cast<int64_t>(id), tokens[id].c_str(), {{"special", true}}));
  }
  specials.push_back(added(16, "<box>"));
  return {{"added_tokens", specials},
          {"normalizer", normalizer},
          {"pre_tokenizer", pre_tokenizer},
          {"post_processor", nullptr},
          {"decoder",
           {{"type", "Sequence"},
            {"decoders", Json::array({{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
                                      {{"type", "ByteFallback"}},
                                      {{"type", "Fuse"}},
                                      {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}})}}},
          {"model",
           {{"type", "BPE"},
            {"unk_token", "<unk>"},
            {"fuse_unk", true},
            {"byte_fallback", true},
            {"vocab", vocab},
            {"merges", Json::array({"▁ a", "a b", "▁a b", "▁ ab", "b c"})}}}};
}

const Json kPrepend = {
    {"type", "Sequence"},
    {"normalizers", Json::array({{{"type", "Prepend"}, {"prepend", "▁"}},
                                 {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}}})}};

std::unique_ptr<Tokenizer> load_characters(const TemporaryFolder& folder, const Json& json) {
  write_json(folder.path() / "tokenizer.json", json);
  return load_tokenizer(folder.path());
}

// A SentencePiece model whose pieces 3 and 4 stand for themselves, and whose folder adds <box> as 11.
fs::path write_sentencepiece(const TemporaryFolder& folder, bool legacy) {
  std::vector<Piece> pieces = {{"<unk>", 0, PieceType::kUnknown},
                               {"<s>", 0, PieceType::kControl},
                               {"</s>", 0, PieceType::kControl},
                               {"<loc_1>", 0, PieceType::kUserDefined},
                               {"<loc_2>", 0, PieceType::kUserDefined}};
  for (const char* text : {"▁", "a", "b", "<", ">", "ab"})
    pieces.push_back({text, -static_cast<float>(pieces.size())});
  folder.write("tokenizer.model", make_sentencepiece_model(pieces, true));
  write_json(folder.path() / "tokenizer_config.json", {{"legacy", legacy}});
  return folder.path();
}

}  // namespace

TEST(AddedTokens, AreOneIdInByteLevelText) {
  const TemporaryFolder folder;
  Json json = read_json(kGolden / "text_bpe_smollm/tokenizer.json");
  const auto before = load_tokenizer(kGolden / "text_bpe_smollm");
  const int64_t think = before->vocab_size();
  json["added_tokens"].push_back(added(think, "<think>"));
  json["added_tokens"].push_back(added(think + 1, "<secret>", {{"special", true}}));
  const auto tokenizer = load_characters(folder, json);
  std::vector<int64_t> expected = encoded(*before, "so ");
  expected.push_back(think);
  for (const int64_t id : encoded(*before, "\nred")) expected.push_back(id);
  EXPECT_EQ(encoded(*tokenizer, "so <think>\nred"), expected);
  EXPECT_EQ(tokenizer->decode(expected), "so <think>\nred");
  // What is marked special stays text, and so does what a text spells in another way.
  EXPECT_EQ(encoded(*tokenizer, "<secret></s> <THINK>"), encoded(*before, "<secret></s> <THINK>"));
  const std::vector<Token> tokens = tokenizer->encode("é <think>x");
  EXPECT_EQ(tokens[tokens.size() - 2].begin, 3);
  EXPECT_EQ(tokens[tokens.size() - 2].end, 10);
  EXPECT_EQ(tokens.back().end, 11);

  tokenizer->save(folder.path() / "saved", "");
  EXPECT_EQ(encoded(*load_tokenizer(folder.path() / "saved"), "so <think>\nred"), expected);
}

TEST(AddedTokens, TakeWhiteSpaceAlongAndStandAloneWhereTheirFlagsSaySo) {
  const TemporaryFolder folder;
  const auto with = [&](const Json& flags) {
    Json json = character_json(nullptr, metaspace("first"));
    json["added_tokens"].push_back(added(17, "<b>", flags));
    json["added_tokens"].push_back(added(18, "<b>>", flags));
    return load_characters(folder, json);
  };
  EXPECT_THAT(encoded(*with(Json::object()), "a <b> b"), ElementsAre(12, 8, 17, 8, 10));
  EXPECT_THAT(encoded(*with({{"lstrip", true}}), "a <b> b"), ElementsAre(12, 17, 8, 10));
  EXPECT_THAT(encoded(*with({{"rstrip", true}}), "a <b> b"), ElementsAre(12, 8, 17, 10));
  EXPECT_THAT(encoded(*with({{"single_word", true}}), "a<b> <b> é<b>"),
              ElementsAre(12, 6, 10, 7, 8, 17, 8, 4, 5, 6, 10, 7));
  EXPECT_THAT(encoded(*with(Json::object()), "a<b>>b"), ElementsAre(12, 18, 10));  // the longest
}

TEST(AddedTokens, InAnAddedTokensFileAreSpecialOnlyWhereAnotherFileSaysSo) {
  const TemporaryFolder folder;
  write_sentencepiece(folder, false);
  write_json(folder.path() / "added_tokens.json",
             {{"<box>", 11}, {"<aa>", 12}, {"<image>", 13}, {"<bb>", 14}});
  write_json(folder.path() / "special_tokens_map.json",
             {{"additional_special_tokens", Json::array({"<aa>", {{"content", "<bb>"}}})}});
  const auto tokenizer = load_tokenizer(folder.path());
  EXPECT_THAT(encoded(*tokenizer, "a<box>b"), ElementsAre(5, 6, 11, 7));
  for (const char* text : {"<aa>", "<bb>", "</s>", "<image>"}) {
    const auto ids = encoded(*tokenizer, text);
    EXPECT_EQ(std::count_if(ids.begin(), ids.end(), [](int64_t id) { return id > 10 || id == 2; }), 0)
        << text;
  }
}

// A chunk behind an added token begins with a prefix in legacy mode only, as behind a control token.
TEST(AddedTokens, CutSentencePieceTextAsTheSlowTokenizerDoes) {
  for (const bool legacy : {false, true}) {
    const TemporaryFolder folder;
    write_sentencepiece(folder, legacy);
    write_json(folder.path() / "added_tokens.json", {{"<box>", 11}});
    const auto tokenizer = load_tokenizer(folder.path());
    EXPECT_THAT(encoded(*tokenizer, "ab<box>"), ElementsAre(5, 10, 11));
    EXPECT_EQ(encoded(*tokenizer, "a<box>b"),
              legacy ? (std::vector<int64_t>{5, 6, 11, 5, 7}) : (std::vector<int64_t>{5, 6, 11, 7}));
  }
}

TEST(AddedTokens, UserDefinedPiecesStayWholeThroughExport) {
  const TemporaryFolder folder;
  const auto tokenizer = load_tokenizer(write_sentencepiece(folder, false));
  const std::vector<int64_t> expected = {5, 6, 3, 4, 7};
  EXPECT_EQ(encoded(*tokenizer, "a<loc_1><loc_2>b"), expected);
  tokenizer->save(folder.path() / "saved", "");
  const auto saved = load_tokenizer(folder.path() / "saved");
  EXPECT_EQ(encoded(*saved, "a<loc_1><loc_2>b"), expected);
  EXPECT_EQ(encoded(*saved, "<loc_1> b"), encoded(*tokenizer, "<loc_1> b"));
  EXPECT_EQ(saved->decode(expected), "a<loc_1><loc_2>b");
  // For HF's library they are added tokens.
  const Json json = read_json(folder.path() / "saved/tokenizer.json");
  int num_found = 0;
  for (const Json& token : json["added_tokens"])
    if (token["id"] == 3 || token["id"] == 4) {
      ++num_found;
      EXPECT_EQ(token["special"], false);
      EXPECT_EQ(token["normalized"], false);
    }
  EXPECT_EQ(num_found, 2);
  for (const auto& [name, value] : tokenizer->gguf_fields(12)) {
    if (name != "tokenizer.ggml.token_type") continue;
    const auto& types = std::get<std::vector<int32_t>>(value);
    EXPECT_EQ(types[3], 4);
    EXPECT_EQ(types[4], 4);
    EXPECT_EQ(types[5], 1);
  }
}

TEST(AddedTokens, ATokenizerJsonMayKnowMoreThanTheModelBesideIt) {
  const TemporaryFolder folder;
  write_sentencepiece(folder, false);
  // Tokens were added, the model is the same.
  Json json = character_json(nullptr, metaspace("first"));
  json["model"]["vocab"] = {{"<unk>", 0}, {"a", 6}};
  json["added_tokens"] = Json::array({added(11, "<box>")});
  EXPECT_THAT(encoded(*load_characters(folder, json), "a<box>b"), ElementsAre(5, 6, 11, 7));
  // Its own model is larger.
  EXPECT_THAT(encoded(*load_characters(folder, character_json(nullptr, metaspace("first"))), "ab c abc"),
              ElementsAre(14, 8, 11, 14, 11));
  // It is of another kind, whatever the other file holds (LLaMA 3's is a list of words).
  folder.write("tokenizer.model", "IQ== 0\nIg== 1\n");
  const auto smollm = load_tokenizer(kGolden / "text_bpe_smollm");
  fs::copy_file(kGolden / "text_bpe_smollm/tokenizer.json", folder.path() / "tokenizer.json",
                fs::copy_options::overwrite_existing);
  EXPECT_EQ(encoded(*load_tokenizer(folder.path()), "The cat"), encoded(*smollm, "The cat"));
}

TEST(CharacterBpe, GivesTheIdsOfHfsLibrary) {
  using Ids = std::vector<int64_t>;
  struct Case {
    const char* name;
    Json normalizer, pre_tokenizer;
    std::vector<Ids> ids;
    std::vector<const char*> decoded;
  };
  const std::vector<const char*> texts = {"ab c abc", "  a", "é\n", "xyz", "b<box> a<box>b"};
  const Ids first = {14, 8, 11, 14, 11};
  const std::vector<Case> cases = {
      {"first",
       nullptr,
       metaspace("first"),
       {first, {8, 12}, {8, 4, 5, 3}, {8, 0}, {8, 10, 16, 12, 16, 10}},
       {"ab c abc", " a", "é\n", "", "b<box> a<box>b"}},
      {"split",
       nullptr,
       metaspace("first", true),
       {first, {8, 12}, {8, 4, 5, 3}, {8, 0}, {8, 10, 16, 12, 16, 10}},
       {"ab c abc", " a", "é\n", "", "b<box> a<box>b"}},
      {"always",
       nullptr,
       metaspace("always"),
       {first, {8, 12}, {8, 4, 5, 3}, {8, 0}, {8, 10, 16, 12, 16, 8, 10}},
       {"ab c abc", " a", "é\n", "", "b<box> a<box> b"}},
      {"never",
       nullptr,
       metaspace("never"),
       {{13, 8, 11, 14, 11}, {8, 12}, {4, 5, 3}, {0}, {10, 16, 12, 16, 10}},
       {"ab c abc", " a", "é\n", "", "b<box> a<box>b"}},
      {"prepend",
       kPrepend,
       nullptr,
       {first, {8, 8, 12}, {8, 4, 5, 3}, {8, 0}, {8, 10, 16, 8, 12, 16, 8, 10}},
       {"ab c abc", "  a", "é\n", "", "b<box>  a<box> b"}},
  };
  for (const Case& c : cases) {
    const TemporaryFolder folder;
    const auto tokenizer = load_characters(folder, character_json(c.normalizer, c.pre_tokenizer));
    const auto check = [&](const Tokenizer& other, const char* what) {
      for (size_t i = 0; i < texts.size(); ++i) {
        EXPECT_EQ(encoded(other, texts[i]), c.ids[i]) << c.name << what << ": " << texts[i];
        EXPECT_EQ(other.decode(c.ids[i]), c.decoded[i]) << c.name << what << ": " << texts[i];
      }
    };
    check(*tokenizer, "");
    EXPECT_EQ(tokenizer->save(folder.path() / "saved", ""), 17);
    const auto saved = load_tokenizer(folder.path() / "saved");
    check(*saved, " saved");
    EXPECT_EQ(saved->token_id("<image>"), 17);
  }
}

TEST(CharacterBpe, KnowsItsBoundsAndTextIsNeverControl) {
  const TemporaryFolder folder;
  const auto tokenizer = load_characters(folder, character_json(nullptr, metaspace("first")));
  EXPECT_THAT(encoded(*tokenizer, "</s>"), ElementsAre(8, 6, 0, 7));  // "/" and "s" are unknown
  EXPECT_THAT(encoded(*tokenizer, "b", TextContext::kAfterControl), ElementsAre(10));
  const std::vector<Token> tokens = tokenizer->encode("é ab");
  ASSERT_EQ(tokens.size(), 4u);  // "▁" and two bytes, then "▁ab"
  EXPECT_EQ(tokens[1].begin, 0);
  EXPECT_EQ(tokens[3].begin, 2);
  EXPECT_EQ(tokens[3].end, 5);
  EXPECT_EQ(tokenizer->decode(std::vector<int64_t>{4, 9}), "\uFFFDa");  // half of a character
  EXPECT_EQ(tokenizer->vocab_size(), 17);
  for (const auto& [name, value] : tokenizer->gguf_fields(17)) {
    if (name == "tokenizer.ggml.scores") {
      const auto& scores = std::get<std::vector<float>>(value);
      EXPECT_GT(scores[12], scores[13]);  // "▁ a" merges before "a b"
    } else if (name == "tokenizer.ggml.token_type") {
      EXPECT_EQ(std::get<std::vector<int32_t>>(value)[3], static_cast<int32_t>(PieceType::kByte));
    }
  }
}

TEST(CharacterBpe, SaysWhatOfAFileItDoesNotFollow) {
  const TemporaryFolder folder;
  const auto refused = [&](const char* pointer, const Json& value) {
    Json json = character_json(kPrepend, metaspace("first"));
    json[Json::json_pointer(pointer)] = value;
    return error_of<CheckpointError>([&] { load_characters(folder, json); });
  };
  EXPECT_EQ(refused("/version", "1.0"), "accepted");
  EXPECT_THAT(refused("/normalizer", {{"type", "NFKC"}}),
              HasSubstr("its normalizer \"NFKC\" is not supported"));
  EXPECT_THAT(refused("/normalizer/normalizers/0/prepend", "x"), HasSubstr("prepends something else"));
  EXPECT_THAT(refused("/pre_tokenizer/replacement", "_"), HasSubstr("its pre_tokenizer \"Metaspace\""));
  EXPECT_THAT(refused("/pre_tokenizer/prepend_scheme", "last"), HasSubstr("its prepend_scheme \"last\""));
  EXPECT_THAT(refused("/decoder", {{"type", "WordPiece"}}), HasSubstr("its decoder \"WordPiece\""));
  EXPECT_THAT(refused("/model/unk_token", "<none>"),
              HasSubstr("its unk_token \"<none>\" is not in the vocabulary"));
  Json bare = character_json(nullptr, nullptr);
  EXPECT_THAT(error_of<CheckpointError>([&] { load_characters(folder, bare); }),
              HasSubstr("nothing in it makes spaces visible"));
}

}  // namespace caldera
