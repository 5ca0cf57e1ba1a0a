#include "data/tokenizers/byte_level_bpe.h"

#include <algorithm>

#include "base/error.h"
#include "base/files.h"
#include "base/words.h"
#include "data/tokenizers/added_tokens.h"
#include "data/tokenizers/factories.h"
#include "data/tokenizers/hf_tokenizer.h"
#include "data/tokenizers/nfc.h"

namespace caldera {
namespace {

class ByteLevelBpeTokenizer final : public HfTokenizer {
 public:
  ByteLevelBpeTokenizer(BpeModel model, TokenizerConfig config, const std::string& where)
      : HfTokenizer(std::move(config)),
        model_(std::move(model)),
        merger_(model_, config_.added_tokens, where),
        splitter_(model_.steps, where),
        added_(config_) {
    for (size_t i = 0; i < model_.tokens.size(); ++i) {
      if (!model_.tokens[i].empty()) ids_.emplace(model_.tokens[i], static_cast<int64_t>(i));
    }
    // HF's own flag wins over what the file's post-processor says.
    model_.adds_bos = config_.flag("add_bos_token", model_.adds_bos);
    check_named_tokens(*this, config_, model_.adds_bos, where);
  }

  std::vector<Token> encode(std::string_view text, TextContext context) const override {
    return added_.encode(text, context,
                         [this](std::string_view part, TextContext) { return encode_plain(part); });
  }

  std::vector<Token> encode_plain(std::string_view text) const {
    MappedText source = repair_utf8(text);
    if (model_.nfc) source = compose_nfc(std::move(source));
    std::vector<Token> tokens;
    tokens.reserve(source.text.size() / 3);
    std::vector<WordToken> computed;
    for (const auto& [begin, end] : splitter_.split(source.text)) {
      const std::string_view word = std::string_view(source.text).substr(begin, end - begin);
      const auto merge = [this](std::string_view bytes) { return merger_.merge(bytes); };
      for (const WordToken& token : cache_.find_or(word, computed, merge)) {
        tokens.push_back({token.id, source.original(begin + static_cast<size_t>(token.begin)),
                          source.original(begin + static_cast<size_t>(token.end))});
      }
    }
    return tokens;
  }

  std::string decode(std::span<const int64_t> ids) const override {
    std::string text;
    for (const int64_t id : ids) {
      if (const AddedToken* added = config_.find_added(id)) {
        if (!added->special) text += added->content;
      } else if (id >= 0 && id < static_cast<int64_t>(model_.tokens.size())) {
        text += alphabet_to_bytes(model_.tokens[static_cast<size_t>(id)]);
      }
    }
    return repair_utf8(text).text;
  }

  bool adds_bos() const override { return model_.adds_bos; }

  int64_t save(const fs::path& folder, const std::string& chat_template, bool add_image_token) const override {
    TokenizerConfig config = config_;
    const int64_t image_id = placeholder_id();
    if (add_image_token) config.add({image_id, kImagePlaceholder});
    config.fields["add_bos_token"] = model_.adds_bos;
    config.fields["add_prefix_space"] = false;
    fs::create_directories(folder);
    write_tokenizer_json(folder / "tokenizer.json", model_, config, bos_id());
    // The generic class takes tokenizer.json as it stands; a model's own class may put its own word splitting
    // in.
    write_tokenizer_config(folder, config, "PreTrainedTokenizerFast", chat_template);
    return image_id;
  }

  GgufFields gguf_fields(int64_t rows) const override {
    const auto preset = std::find_if(gguf_presets().begin(), gguf_presets().end(),
                                     [this](const GgufPreset& p) { return p.steps == model_.steps; });
    CALDERA_CHECK(preset != gguf_presets().end(), ConfigError,
                  "--format gguf: no name is known by which llama.cpp would cut texts into words as this tokenizer does");
    std::vector<Piece> pieces;
    for (const std::string& token : model_.tokens)
      pieces.push_back({token, 0, token.empty() ? PieceType::kUnused : PieceType::kNormal});
    GgufFields fields = gguf_vocabulary_fields(
        "gpt2", preset->name, gguf_vocabulary(std::move(pieces), config_.added_tokens, rows),
        {bos_id(), eos_id(), named_id(config_.unk_token), pad_id(), model_.adds_bos});
    std::vector<std::string> merges;
    for (const auto& [left, right] : model_.merges)
      merges.push_back(model_.tokens[static_cast<size_t>(left)] + " " + model_.tokens[static_cast<size_t>(right)]);
    fields.emplace_back("tokenizer.ggml.merges", std::move(merges));
    return fields;
  }

 private:
  int64_t model_id(std::string_view token) const override {
    const auto found = ids_.find(token);
    return found == ids_.end() ? -1 : found->second;
  }
  int64_t model_size() const override { return std::ssize(model_.tokens); }

  BpeModel model_;
  std::unordered_map<std::string_view, int64_t> ids_;  // views into model_.tokens
  BpeMerger merger_;
  WordSplitter splitter_;
  AddedTokenFinder added_;
  WordCache cache_;
};

}  // namespace

void check_named_tokens(const Tokenizer& tokenizer, const TokenizerConfig& config, bool adds_bos,
                        const std::string& where) {
  for (const std::string* token : {&config.bos_token, &config.eos_token, &config.pad_token}) {
    CALDERA_CHECK(token->empty() || tokenizer.token_id(*token) >= 0, CheckpointError,
                  "{}: the token \"{}\" of its configuration is not in the vocabulary", where, *token);
  }
  CALDERA_CHECK(!adds_bos || !config.bos_token.empty(), CheckpointError,
                "{}: texts begin with BOS (add_bos_token), but there is no bos_token", where);
}

std::unique_ptr<Tokenizer> make_byte_level_bpe_tokenizer(BpeModel model, TokenizerConfig config,
                                                         const std::string& where) {
  return std::make_unique<ByteLevelBpeTokenizer>(std::move(model), std::move(config), where);
}

}  // namespace caldera
