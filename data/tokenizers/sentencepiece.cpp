#include <sentencepiece_processor.h>

#include <algorithm>

#include "base/error.h"
#include "base/files.h"
#include "base/words.h"
#include "data/tokenizers/factories.h"
#include "data/tokenizers/sentencepiece_model.h"

namespace caldera {
namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, SentencePiece's visible space

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string model, TokenizerConfig config, const std::string& where)
      : model_(std::move(model)), config_(std::move(config)) {
    is_bpe_ = check_sentencepiece_model(model_, where);
    legacy_ = config_.flag("legacy", true);
    add_bos_ = config_.flag("add_bos_token", true);
    add_prefix_ = config_.flag("add_prefix_space", true);
    // As HF: the legacy tokenizer leaves the dummy prefix to the model, the newer one adds it itself.
    const auto status =
        processor_.LoadFromSerializedProto(legacy_ ? model_ : model_ + std::string(kWithoutDummyPrefix));
    CALDERA_CHECK(status.ok(), CheckpointError, "{}: SentencePiece cannot load it: {}", where,
                  status.ToString());
    num_pieces_ = processor_.GetPieceSize();
    const auto name = [&](std::string& token, int id) {
      if (token.empty() && id >= 0) token = processor_.IdToPiece(id);
      CALDERA_CHECK(token.empty() || token_id(token) >= 0, CheckpointError,
                    "{}: the token \"{}\" of its configuration is neither a piece nor an added token", where,
                    token);
    };
    name(config_.bos_token, processor_.bos_id());
    name(config_.eos_token, processor_.eos_id());
    name(config_.unk_token, processor_.unk_id());
    name(config_.pad_token, processor_.pad_id());
    num_unk_pieces_ = processor_.EncodeAsPieces(config_.unk_token).size();
  }

  std::vector<Token> encode(std::string_view text, TextContext context) const override {
    if (text.empty()) return {};
    std::string prefix;
    size_t num_skipped = 0;
    if (!legacy_) {
      if (context == TextContext::kStart && add_prefix_) prefix = kSpace;
      // Leading spaces would be lost in some models. HF's way round: an unknown token before them, whose
      // pieces are dropped.
      if (!prefix.empty() || text.starts_with(' ') || text.starts_with(kSpace)) {
        prefix = config_.unk_token + prefix;
        num_skipped = num_unk_pieces_;
      }
    }
    // Its pieces point into the proto, which must outlive them.
    const auto proto = processor_.EncodeAsImmutableProto(prefix + std::string(text));
    const auto pieces = proto.pieces();
    if (pieces.size() < num_skipped) num_skipped = 0;
    std::vector<Token> tokens;
    tokens.reserve(pieces.size());
    const auto shift = static_cast<int64_t>(prefix.size());
    for (size_t i = num_skipped; i < pieces.size(); ++i) {
      const auto& piece = pieces[i];
      tokens.push_back({piece.id(), std::max<int64_t>(piece.begin() - shift, 0),
                        std::max<int64_t>(piece.end() - shift, 0)});
    }
    return tokens;
  }

  std::string decode(std::span<const int64_t> ids) const override {
    std::string text;
    std::vector<int> run;
    const auto flush = [&] {
      if (run.empty()) return;
      std::string part;
      const auto status = processor_.Decode(run, &part);
      CALDERA_ASSERT(status.ok());
      // The newer tokenizer's model has no dummy prefix to take back; HF takes it off the first piece of all.
      if (!legacy_ && add_prefix_ && text.empty() && processor_.IdToPiece(run.front()).starts_with(kSpace) &&
          part.starts_with(' ')) {
        part.erase(0, 1);
      }
      text += part;
      run.clear();
    };
    for (const int64_t id : ids) {
      if (const AddedToken* added = find_added(id)) {
        if (added->special) continue;
        flush();
        text += added->content;
      } else if (id >= 0 && id < num_pieces_) {
        const int piece = static_cast<int>(id);
        if (!processor_.IsControl(piece) && !processor_.IsUnknown(piece)) run.push_back(piece);
      }
    }
    flush();
    return text;
  }

  int64_t token_id(std::string_view token) const override {
    if (const AddedToken* added = config_.find_added(token)) return added->id;
    const int id = processor_.PieceToId(token);  // the unknown piece's where there is none
    return id >= 0 && id < processor_.GetPieceSize() && processor_.IdToPiece(id) == token ? id : -1;
  }

  int64_t vocab_size() const override {
    return std::max(num_pieces_, config_.added_tokens.empty() ? 0 : config_.added_tokens.back().id + 1);
  }
  int64_t bos_id() const override { return named_id(config_.bos_token); }
  int64_t eos_id() const override { return named_id(config_.eos_token); }
  int64_t pad_id() const override { return named_id(config_.pad_token); }
  bool adds_bos() const override { return add_bos_; }
  const std::string& chat_template() const override { return config_.chat_template; }

  int64_t save(const fs::path& folder, const std::string& chat_template, bool add_image_token) const override {
    TokenizerConfig config = config_;
    int64_t image_id = token_id(kImagePlaceholder);
    if (image_id < 0) image_id = vocab_size();
    if (add_image_token) config.add({image_id, kImagePlaceholder});
    for (const std::string& token :
         {config.unk_token, config.bos_token, config.eos_token, config.pad_token}) {
      if (!token.empty()) config.add({token_id(token), token});
    }
    config.fields["legacy"] =
        legacy_;  // said aloud: what its absence means has changed between versions of HF's library
    config.fields["add_bos_token"] = add_bos_;
    if (!config.fields.contains("add_eos_token")) config.fields["add_eos_token"] = false;
    fs::create_directories(folder);
    write_file_atomic(folder / "tokenizer.model", model_);
    if (is_bpe_) {
      write_sentencepiece_json(folder / "tokenizer.json", pieces(), config,
                               {legacy_, add_bos_, add_prefix_, bos_id()});
    }
    write_tokenizer_config(folder, config, "LlamaTokenizer", chat_template);
    return image_id;
  }

  GgufFields gguf_fields(int64_t rows) const override {
    CALDERA_CHECK(is_bpe_, ConfigError,
                  "--format gguf: llama.cpp's SentencePiece tokenizer merges pieces (BPE); this one is a unigram model, which it "
                  "would cut otherwise");
    const std::vector<Piece> vocabulary = gguf_vocabulary(pieces(), config_.added_tokens, rows);
    GgufFields fields = gguf_vocabulary_fields(
        "llama", "default", vocabulary, {bos_id(), eos_id(), named_id(config_.unk_token), pad_id(), add_bos_});
    std::vector<float> scores;
    for (const Piece& piece : vocabulary) scores.push_back(piece.score);
    fields.emplace_back("tokenizer.ggml.scores", std::move(scores));
    fields.emplace_back("tokenizer.ggml.add_space_prefix", add_prefix_);
    return fields;
  }

 private:
  const AddedToken* find_added(int64_t id) const {
    for (const AddedToken& token : config_.added_tokens) {
      if (token.id == id) return &token;
    }
    return nullptr;
  }
  std::vector<Piece> pieces() const {
    std::vector<Piece> pieces;
    for (int id = 0; id < static_cast<int>(num_pieces_); ++id) {
      const PieceType type = processor_.IsUnknown(id)   ? PieceType::kUnknown
                             : processor_.IsControl(id) ? PieceType::kControl
                             : processor_.IsUnused(id)  ? PieceType::kUnused
                             : processor_.IsByte(id)    ? PieceType::kByte
                                                        : PieceType::kNormal;
      pieces.push_back({processor_.IdToPiece(id), processor_.GetScore(id), type});
    }
    return pieces;
  }
  int64_t named_id(const std::string& token) const { return token.empty() ? -1 : token_id(token); }

  std::string model_;  // as it was read, for save()
  TokenizerConfig config_;
  sentencepiece::SentencePieceProcessor processor_;
  bool is_bpe_ = true, legacy_ = true, add_bos_ = true, add_prefix_ = true;
  int64_t num_pieces_ = 0;
  size_t num_unk_pieces_ = 0;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(std::string model, TokenizerConfig config,
                                                        const std::string& where) {
  return std::make_unique<SentencePieceTokenizer>(std::move(model), std::move(config), where);
}

}  // namespace caldera
