// A tokenizer.json of the SentencePiece kind, as transformers saves LLaMA's: BPE over characters, spaces made
// visible, bytes for what the vocabulary lacks. It gives the ids of HF's library for the same file, which
// differ from those of the tokenizer.model it was made from where a text begins with a space.
#include <algorithm>

#include "base/error.h"
#include "base/files.h"
#include "base/words.h"
#include "data/tokenizers/added_tokens.h"
#include "data/tokenizers/factories.h"
#include "data/tokenizers/hf_tokenizer.h"
#include "data/tokenizers/utf8.h"

namespace caldera {
namespace {

using Prefix = CharacterBpe::Prefix;

// The byte that a token "<0x1F>" stands for, -1 where it is none.
int byte_of(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return -1;
  int byte = 0;
  for (const char c : token.substr(3, 2)) {
    if (!((c >= '0' && c <= '9') || (c >= 'A' && c <= 'F'))) return -1;
    byte = byte * 16 + (c <= '9' ? c - '0' : c - 'A' + 10);
  }
  return byte;
}

// Whether a token reaches from one word into the next; without such ones words can be merged one by one.
bool has_joining_token(const std::vector<std::string>& tokens) {
  return std::any_of(tokens.begin(), tokens.end(), [](std::string_view token) {
    while (token.starts_with(kVisibleSpace)) token.remove_prefix(kVisibleSpace.size());
    return token.find(kVisibleSpace) != std::string_view::npos;
  });
}

class CharacterBpeTokenizer final : public HfTokenizer {
 public:
  CharacterBpeTokenizer(BpeModel model, TokenizerConfig config, const std::string& where)
      : HfTokenizer(std::move(config)),
        model_(std::move(model)),
        kind_(*model_.characters),
        merger_(model_, config_.added_tokens, where),
        added_(config_),
        has_separate_words_(kind_.splits_words || !has_joining_token(model_.tokens)) {
    for (size_t i = 0; i < model_.tokens.size(); ++i)
      if (!model_.tokens[i].empty()) ids_.emplace(model_.tokens[i], static_cast<int64_t>(i));
    if (config_.unk_token.empty() && kind_.unknown >= 0)
      config_.unk_token = model_.tokens[static_cast<size_t>(kind_.unknown)];
    model_.adds_bos = config_.flag("add_bos_token", model_.adds_bos);
    check_named_tokens(*this, config_, model_.adds_bos, where);
  }

  std::vector<Token> encode(std::string_view text, TextContext context) const override {
    return added_.encode(text, context, [this](std::string_view part, TextContext place) {
      return encode_plain(part, place);
    });
  }

  std::string decode(std::span<const int64_t> ids) const override {
    std::string text, bytes;
    const auto flush = [&] {
      // A run of bytes that is no text is as many signs of it as there are bytes, as in HF's decoder.
      if (is_valid_utf8(bytes)) {
        text += bytes;
      } else {
        for (size_t i = 0; i < bytes.size(); ++i) append_utf8(text, kReplacement);
      }
      bytes.clear();
    };
    for (const int64_t id : ids) {
      const AddedToken* added = config_.find_added(id);
      if (added != nullptr && added->special) continue;
      if (added == nullptr && (id < 0 || id >= std::ssize(model_.tokens) || id == kind_.unknown)) continue;
      std::string_view token = added ? added->content : model_.tokens[static_cast<size_t>(id)];
      if (const int byte = added ? -1 : byte_of(token); byte >= 0) {
        bytes += static_cast<char>(static_cast<unsigned char>(byte));
        continue;
      }
      flush();
      while (!token.empty()) {
        const size_t space = std::min(token.find(kVisibleSpace), token.size());
        text += token.substr(0, space);
        if (space < token.size()) text += ' ';
        token.remove_prefix(std::min(space + kVisibleSpace.size(), token.size()));
      }
    }
    flush();
    if (kind_.strips_space && text.starts_with(' ')) text.erase(0, 1);
    return text;
  }

  bool adds_bos() const override { return model_.adds_bos; }

  int64_t save(const fs::path& folder, const std::string& chat_template,
               bool add_image_token) const override {
    TokenizerConfig config = config_;
    const int64_t image_id = placeholder_id();
    if (add_image_token) config.add({image_id, kImagePlaceholder});
    config.fields["add_bos_token"] = model_.adds_bos;
    fs::create_directories(folder);
    write_tokenizer_json(folder / "tokenizer.json", model_, config, bos_id());
    // The generic class takes tokenizer.json as it stands.
    write_tokenizer_config(folder, config, "PreTrainedTokenizerFast", chat_template);
    return image_id;
  }

  // llama.cpp merges what makes the best-scored piece, so a piece's score is the rank of its first merge.
  GgufFields gguf_fields(int64_t rows) const override {
    std::vector<Piece> pieces;
    for (size_t id = 0; id < model_.tokens.size(); ++id) {
      const std::string& token = model_.tokens[id];
      const PieceType type = token.empty()                                ? PieceType::kUnused
                             : static_cast<int64_t>(id) == kind_.unknown  ? PieceType::kUnknown
                             : kind_.byte_fallback && byte_of(token) >= 0 ? PieceType::kByte
                                                                          : PieceType::kNormal;
      pieces.push_back({token, -static_cast<float>(model_.merges.size()), type});
    }
    for (size_t rank = model_.merges.size(); rank-- > 0;) {
      const auto [left, right] = model_.merges[rank];
      const auto made =
          ids_.at(model_.tokens[static_cast<size_t>(left)] + model_.tokens[static_cast<size_t>(right)]);
      pieces[static_cast<size_t>(made)].score = -static_cast<float>(rank);
    }
    const std::vector<Piece> vocabulary = gguf_vocabulary(std::move(pieces), config_.added_tokens, rows);
    GgufFields fields =
        gguf_vocabulary_fields("llama", "default", vocabulary,
                               {bos_id(), eos_id(), named_id(config_.unk_token), pad_id(), model_.adds_bos});
    std::vector<float> scores;
    for (const Piece& piece : vocabulary) scores.push_back(piece.score);
    fields.emplace_back("tokenizer.ggml.scores", std::move(scores));
    fields.emplace_back("tokenizer.ggml.add_space_prefix", kind_.prefix != Prefix::kNever);
    return fields;
  }

 private:
  int64_t model_id(std::string_view token) const override {
    const auto found = ids_.find(std::string(token));
    return found == ids_.end() ? -1 : found->second;
  }
  int64_t model_size() const override { return std::ssize(model_.tokens); }

  std::vector<Token> encode_plain(std::string_view text, TextContext context) const {
    if (text.empty()) return {};
    const MappedText source = repair_utf8(text);
    MappedText visible;
    const auto put = [&](std::string_view bytes, size_t from) {
      for (size_t i = 0; i < bytes.size(); ++i)
        visible.origin.push_back(static_cast<uint32_t>(source.original(from)));
      visible.text += bytes;
    };
    const bool begins_with_space = source.text[0] == ' ' || source.text.starts_with(kVisibleSpace);
    const bool wants_prefix =
        kind_.prefix == Prefix::kAnyway ||
        (!begins_with_space && (kind_.prefix == Prefix::kAlways ||
                                (kind_.prefix == Prefix::kFirst && context == TextContext::kStart)));
    if (wants_prefix) put(kVisibleSpace, 0);
    for (size_t i = 0; i < source.text.size(); ++i)
      put(source.text[i] == ' ' ? kVisibleSpace : std::string_view(source.text).substr(i, 1), i);
    visible.origin.push_back(static_cast<uint32_t>(text.size()));

    std::vector<Token> tokens;
    std::vector<WordToken> computed;
    const auto merge = [this](std::string_view word) { return merger_.merge(word); };
    for (size_t begin = 0; begin < visible.text.size();) {
      const size_t end = has_separate_words_ ? word_end(visible.text, begin) : visible.text.size();
      const std::string_view word = std::string_view(visible.text).substr(begin, end - begin);
      for (const WordToken& token : cache_.find_or(word, computed, merge))
        tokens.push_back({token.id, visible.original(begin + static_cast<size_t>(token.begin)),
                          visible.original(begin + static_cast<size_t>(token.end))});
      begin = end;
    }
    return tokens;
  }
  // Visible spaces, then what is none; where the file cuts at every space, one of them.
  size_t word_end(std::string_view text, size_t begin) const {
    size_t at = begin;
    while (text.substr(at).starts_with(kVisibleSpace)) {
      at += kVisibleSpace.size();
      if (kind_.splits_words) break;
    }
    return std::min(text.find(kVisibleSpace, at), text.size());
  }
  BpeModel model_;
  CharacterBpe kind_;
  std::unordered_map<std::string, int64_t> ids_;
  BpeMerger merger_;
  AddedTokenFinder added_;
  bool has_separate_words_;
  WordCache cache_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_character_bpe_tokenizer(BpeModel model, TokenizerConfig config,
                                                        const std::string& where) {
  return std::make_unique<CharacterBpeTokenizer>(std::move(model), std::move(config), where);
}

}  // namespace caldera
