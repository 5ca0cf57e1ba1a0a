#include <sentencepiece_processor.h>

#include <algorithm>

#include "base/error.h"
#include "base/files.h"
#include "base/words.h"
#include "data/tokenizers/added_tokens.h"
#include "data/tokenizers/factories.h"
#include "data/tokenizers/hf_tokenizer.h"
#include "data/tokenizers/sentencepiece_model.h"
#include "data/tokenizers/utf8.h"
#include "data/tokenizers/word_cache.h"

namespace caldera {
namespace {

// Where the word that begins at `begin` ends: spaces, then what is none.
size_t word_end(std::string_view text, size_t begin) {
  const size_t solid = std::min(text.find_first_not_of(' ', begin), text.size());
  return std::min(text.find(' ', solid), text.size());
}

// Whether each of its bytes stands for itself, to SentencePiece, and a space is a space.
bool is_plain(std::string_view text) {
  return is_ascii(text) || (is_valid_utf8(text) && text.find(kVisibleSpace) == std::string_view::npos);
}

class SentencePieceTokenizer final : public HfTokenizer {
 public:
  SentencePieceTokenizer(std::string model, TokenizerConfig config, const std::string& where)
      : HfTokenizer(std::move(config)), model_(std::move(model)) {
    kind_ = check_sentencepiece_model(model_, where);
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
    added_ = AddedTokenFinder(config_, [this](int64_t id) { return is_user_defined(id); });
  }

  std::vector<Token> encode(std::string_view text, TextContext context) const override {
    return added_.encode(text, context, [this](std::string_view part, TextContext place) {
      return encode_plain(part, place);
    });
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
      if (!legacy_ && add_prefix_ && text.empty() &&
          processor_.IdToPiece(run.front()).starts_with(kVisibleSpace) && part.starts_with(' ')) {
        part.erase(0, 1);
      }
      text += part;
      run.clear();
    };
    for (const int64_t id : ids) {
      if (const AddedToken* added = config_.find_added(id)) {
        if (added->special) continue;
        if (is_user_defined(id)) {
          run.push_back(static_cast<int>(id));
          continue;
        }
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

  bool adds_bos() const override { return add_bos_; }

  int64_t save(const fs::path& folder, const std::string& chat_template,
               bool add_image_token) const override {
    TokenizerConfig config = config_;
    const int64_t image_id = placeholder_id();
    if (add_image_token) config.add({image_id, kImagePlaceholder});
    for (const std::string& token :
         {config.unk_token, config.bos_token, config.eos_token, config.pad_token}) {
      if (!token.empty()) config.add({token_id(token), token});
    }
    // Pieces that stand for themselves are one token to HF's other library, which knows no such pieces.
    for (const int64_t id : kind_.user_defined)
      config.add({id, processor_.IdToPiece(static_cast<int>(id)), /*special=*/false});
    config.fields["legacy"] =
        legacy_;  // said aloud: what its absence means has changed between versions of HF's library
    config.fields["add_bos_token"] = add_bos_;
    if (!config.fields.contains("add_eos_token")) config.fields["add_eos_token"] = false;
    fs::create_directories(folder);
    write_file_atomic(folder / "tokenizer.model", model_);
    if (kind_.is_bpe) {
      write_sentencepiece_json(folder / "tokenizer.json", pieces(), config,
                               {legacy_, add_bos_, add_prefix_, bos_id()});
    }
    write_tokenizer_config(folder, config, "LlamaTokenizer", chat_template);
    return image_id;
  }

  GgufFields gguf_fields(int64_t rows) const override {
    CALDERA_CHECK(kind_.is_bpe, ConfigError,
                  "--format gguf: llama.cpp's SentencePiece tokenizer merges pieces (BPE); this one is a "
                  "unigram model, which it "
                  "would cut otherwise");
    const std::vector<Piece> vocabulary = gguf_vocabulary(pieces(), config_.added_tokens, rows);
    GgufFields fields =
        gguf_vocabulary_fields("llama", "default", vocabulary,
                               {bos_id(), eos_id(), named_id(config_.unk_token), pad_id(), add_bos_});
    std::vector<float> scores;
    for (const Piece& piece : vocabulary) scores.push_back(piece.score);
    fields.emplace_back("tokenizer.ggml.scores", std::move(scores));
    fields.emplace_back("tokenizer.ggml.add_space_prefix", add_prefix_);
    return fields;
  }

 private:
  int64_t model_id(std::string_view token) const override {
    const int id = processor_.PieceToId(token);  // the unknown piece's where there is none
    return id >= 0 && id < processor_.GetPieceSize() && processor_.IdToPiece(id) == token ? id : -1;
  }
  int64_t model_size() const override { return num_pieces_; }

  bool is_user_defined(int64_t id) const {
    return std::binary_search(kind_.user_defined.begin(), kind_.user_defined.end(), id);
  }

  std::vector<Token> encode_plain(std::string_view text, TextContext context) const {
    if (text.empty()) return {};
    const bool wants_prefix =
        legacy_ ? kind_.add_dummy_prefix : context == TextContext::kStart && add_prefix_;
    return kind_.has_separate_words && is_plain(text) ? encode_words(text, wants_prefix)
                                                      : encode_whole(text, wants_prefix);
  }

  // The library's own way.
  std::vector<Token> encode_whole(std::string_view text, bool wants_prefix) const {
    std::string prefix;
    size_t num_skipped = 0;
    if (!legacy_) {
      if (wants_prefix) prefix = kVisibleSpace;
      // Leading spaces would be lost in some models. HF's way round: an unknown token before them, whose
      // pieces are dropped.
      if (wants_prefix || text.starts_with(' ') || text.starts_with(kVisibleSpace)) {
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

  // The same word by word, each of which the library sees but once.
  std::vector<Token> encode_words(std::string_view text, bool wants_prefix) const {
    std::vector<Token> tokens;
    tokens.reserve(text.size() / 3 + 1);
    std::vector<WordToken> computed;
    const auto put = [&](std::string_view word, int64_t offset) {
      const auto cut = [this](std::string_view bytes) { return cut_word(bytes); };
      for (const WordToken& token : words_.find_or(word, computed, cut))
        tokens.push_back({token.id, std::max<int64_t>(offset + token.begin, 0), offset + token.end});
    };
    size_t begin = 0;
    if (wants_prefix) {
      begin = word_end(text, 0);
      put(" " + std::string(text.substr(0, begin)), -1);
    }
    while (begin < text.size()) {
      const size_t end = word_end(text, begin);
      put(text.substr(begin, end - begin), static_cast<int64_t>(begin));
      begin = end;
    }
    return tokens;
  }

  std::vector<WordToken> cut_word(std::string_view word) const {
    if (word == " ") return {{processor_.PieceToId(kVisibleSpace), 0, 1}};
    // Where the library puts a space before all it sees, that is the word's first one.
    const bool is_prefixed = legacy_ && kind_.add_dummy_prefix;
    const auto proto = processor_.EncodeAsImmutableProto(word.substr(is_prefixed ? 1 : 0));
    const int32_t shift = is_prefixed ? 1 : 0;
    std::vector<WordToken> tokens;
    for (const auto& piece : proto.pieces()) {
      const int32_t begin = tokens.empty() ? 0 : static_cast<int32_t>(piece.begin()) + shift;
      tokens.push_back({static_cast<int32_t>(piece.id()), begin, static_cast<int32_t>(piece.end()) + shift});
    }
    return tokens;
  }

  std::vector<Piece> pieces() const {
    std::vector<Piece> pieces;
    for (int id = 0; id < static_cast<int>(num_pieces_); ++id) {
      const PieceType type = processor_.IsUnknown(id)   ? PieceType::kUnknown
                             : processor_.IsControl(id) ? PieceType::kControl
                             : processor_.IsUnused(id)  ? PieceType::kUnused
                             : processor_.IsByte(id)    ? PieceType::kByte
                             : is_user_defined(id)      ? PieceType::kUserDefined
                                                        : PieceType::kNormal;
      pieces.push_back({processor_.IdToPiece(id), processor_.GetScore(id), type});
    }
    return pieces;
  }
  std::string model_;  // as it was read, for save()
  sentencepiece::SentencePieceProcessor processor_;
  SentencePieceKind kind_;
  bool legacy_ = true, add_bos_ = true, add_prefix_ = true;
  int64_t num_pieces_ = 0;
  size_t num_unk_pieces_ = 0;
  AddedTokenFinder added_;
  WordCache words_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(std::string model, TokenizerConfig config,
                                                        const std::string& where) {
  return std::make_unique<SentencePieceTokenizer>(std::move(model), std::move(config), where);
}

}  // namespace caldera
