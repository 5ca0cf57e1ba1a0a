// Tokenizers as GGUF files hold them: what llama.cpp's converter writes for the same tokenizer.
#include "base/error.h"
#include "data/tokenizers/factories.h"

namespace caldera {
namespace {

constexpr float kUnusedScore = -10000, kAddedScore = -1000;  // as llama.cpp's converter has them

}  // namespace

const std::vector<GgufPreset>& gguf_presets() {
  using Kind = SplitStep::Kind;
  static const std::vector<SplitStep> gpt2 = {{Kind::kByteLevel, ""}};
  static const std::vector<SplitStep> digits = {{Kind::kDigits, ""}, {Kind::kByteLevel, ""}};
  static const std::vector<SplitStep> qwen2 = {
      {Kind::kSplit,
       R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}};
  static const std::vector<SplitStep> llama3 = {
      {Kind::kSplit,
       R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"}};
  static const std::vector<GgufPreset> all = {
      {"smollm", digits, false, false, false},
      {"gpt-2", gpt2, false, false, false},
      {"qwen2", qwen2, true, false, false},
      {"llama-bpe", llama3, false, true, true},
  };
  return all;
}

std::vector<Piece> gguf_vocabulary(std::vector<Piece> pieces, const std::vector<AddedToken>& added_tokens,
                                   int64_t vocab_size) {
  std::vector<Piece> vocabulary = std::move(pieces);
  vocabulary.resize(static_cast<size_t>(vocab_size));
  for (const AddedToken& token : added_tokens) {
    if (token.id >= vocab_size) continue;
    Piece& piece = vocabulary[static_cast<size_t>(token.id)];
    // SentencePiece has exactly one unknown piece, and it stays that.
    if (piece.type == PieceType::kUnknown && piece.text == token.content) continue;
    piece = {token.content, kAddedScore, token.special ? PieceType::kControl : PieceType::kUserDefined};
  }
  for (size_t id = 0; id < vocabulary.size(); ++id)
    if (vocabulary[id].text.empty())
      vocabulary[id] = {fmt::format("[PAD{}]", id), kUnusedScore, PieceType::kUnused};
  return vocabulary;
}

GgufFields gguf_vocabulary_fields(const char* model, const std::string& pre,
                                  const std::vector<Piece>& vocabulary, const SpecialIds& ids) {
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  for (const Piece& piece : vocabulary) {
    tokens.push_back(piece.text);
    types.push_back(static_cast<int32_t>(piece.type));
  }
  GgufFields fields = {{"tokenizer.ggml.model", std::string(model)},
                       {"tokenizer.ggml.pre", pre},
                       {"tokenizer.ggml.tokens", std::move(tokens)},
                       {"tokenizer.ggml.token_type", std::move(types)}};
  const std::pair<const char*, int64_t> special[] = {
      {"bos", ids.bos}, {"eos", ids.eos}, {"unknown", ids.unknown}, {"padding", ids.padding}};
  for (const auto& [name, id] : special)
    if (id >= 0 && id < static_cast<int64_t>(vocabulary.size()))
      fields.emplace_back(fmt::format("tokenizer.ggml.{}_token_id", name), static_cast<uint32_t>(id));
  fields.emplace_back("tokenizer.ggml.add_bos_token", ids.adds_bos);
  fields.emplace_back("tokenizer.ggml.add_eos_token", false);
  return fields;
}

}  // namespace caldera
