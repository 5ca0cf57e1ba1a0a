#include <unordered_map>

#include "base/error.h"
#include "base/strings.h"
#include "data/tokenizers/factories.h"
#include "data/tokenizers/sentencepiece_model.h"

namespace caldera {
namespace {

class GgufTokenizerReader {
 public:
  explicit GgufTokenizerReader(const GgufFile& file) : file_(file), where_(file.path().string()) {
    tokens_ = file_.get<std::vector<std::string>>("tokenizer.ggml.tokens");
    CALDERA_CHECK(!tokens_.empty(), CheckpointError, "{}: tokenizer.ggml.tokens is empty", where_);
    types_ = file_.get_or<std::vector<int64_t>>("tokenizer.ggml.token_type", {});
    CALDERA_CHECK(types_.empty() || types_.size() == tokens_.size(), CheckpointError,
                  "{}: tokenizer.ggml.token_type has {} entries for {} tokens", where_, types_.size(),
                  tokens_.size());
    config_.bos_token = named("tokenizer.ggml.bos_token_id");
    config_.eos_token = named("tokenizer.ggml.eos_token_id");
    config_.unk_token = named("tokenizer.ggml.unknown_token_id");
    config_.pad_token = named("tokenizer.ggml.padding_token_id");
    config_.chat_template = file_.get_or<std::string>("tokenizer.chat_template", "");
  }

  std::unique_ptr<Tokenizer> byte_level_bpe() {
    const std::string pre = file_.get_or<std::string>("tokenizer.ggml.pre", "gpt-2");
    const GgufPreset* preset = nullptr;
    std::vector<std::string> known;
    for (const GgufPreset& candidate : gguf_presets()) {
      known.emplace_back(candidate.name);
      if (pre == candidate.name) preset = &candidate;
    }
    CALDERA_CHECK(preset != nullptr, CheckpointError,
                  "{}: tokenizer.ggml.pre \"{}\" is not supported; known: {}", where_, pre,
                  join(known, ", "));
    BpeModel model;
    model.steps = preset->steps;
    model.nfc = preset->nfc;
    model.ignore_merges = preset->ignore_merges;
    model.adds_bos = file_.get_or<bool>("tokenizer.ggml.add_bos_token", preset->adds_bos);

    std::unordered_map<std::string_view, int32_t> ids;
    for (size_t i = 0; i < tokens_.size(); ++i) {
      const auto id = static_cast<int32_t>(i);
      const PieceType type = type_of(i);
      CALDERA_CHECK(!tokens_[i].empty() && ids.emplace(tokens_[i], id).second, CheckpointError,
                    "{}: token {} (\"{}\") is empty or occurs twice", where_, id, tokens_[i]);
      if (type == PieceType::kControl || type == PieceType::kUserDefined) {
        config_.add({id, tokens_[i], type == PieceType::kControl});
      }
    }
    for (const std::string& merge : file_.get<std::vector<std::string>>("tokenizer.ggml.merges")) {
      const std::string_view pair = merge;
      const size_t space = pair.find(' ', 1);  // a token may begin with a space, never hold another
      const auto left = ids.find(pair.substr(0, space));
      const auto right = space == std::string_view::npos ? ids.end() : ids.find(pair.substr(space + 1));
      CALDERA_CHECK(left != ids.end() && right != ids.end(), CheckpointError,
                    "{}: the merge \"{}\" is not a pair of tokens", where_, merge);
      model.merges.emplace_back(left->second, right->second);
    }
    model.tokens = tokens_;
    return make_byte_level_bpe_tokenizer(std::move(model), std::move(config_), where_);
  }

  std::unique_ptr<Tokenizer> sentencepiece() {
    const auto scores = file_.get<std::vector<double>>("tokenizer.ggml.scores");
    CALDERA_CHECK(scores.size() == tokens_.size() && !types_.empty(), CheckpointError,
                  "{}: tokenizer.ggml.scores has {} entries and token_type {} for {} tokens", where_,
                  scores.size(), types_.size(), tokens_.size());
    std::vector<Piece> pieces;
    for (size_t i = 0; i < tokens_.size(); ++i)
      pieces.push_back({tokens_[i], static_cast<float>(scores[i]), type_of(i)});
    config_.fields["legacy"] = true;  // llama.cpp puts a space after every control token
    config_.fields["add_bos_token"] = file_.get_or<bool>("tokenizer.ggml.add_bos_token", true);
    const bool prefix = file_.get_or<bool>("tokenizer.ggml.add_space_prefix", true);
    return make_sentencepiece_tokenizer(make_sentencepiece_model(pieces, prefix), std::move(config_), where_);
  }

 private:
  PieceType type_of(size_t id) const {
    if (types_.empty()) return PieceType::kNormal;
    CALDERA_CHECK(types_[id] >= 1 && types_[id] <= 6, CheckpointError,
                  "{}: token {} is of the unknown type {}", where_, id, types_[id]);
    return static_cast<PieceType>(types_[id]);
  }
  std::string named(const char* key) const {
    if (!file_.has(key)) return "";
    const int64_t id = file_.get<int64_t>(key);
    CALDERA_CHECK(id >= 0 && id < static_cast<int64_t>(tokens_.size()), CheckpointError,
                  "{}: {} is {}, but there are {} tokens", where_, key, id, tokens_.size());
    return tokens_[static_cast<size_t>(id)];
  }

  const GgufFile& file_;
  std::string where_;
  std::vector<std::string> tokens_;
  std::vector<int64_t> types_;
  TokenizerConfig config_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_gguf_tokenizer(const GgufFile& file) {
  const std::string kind = file.get<std::string>("tokenizer.ggml.model");
  if (kind == "gpt2") return GgufTokenizerReader(file).byte_level_bpe();
  if (kind == "llama") return GgufTokenizerReader(file).sentencepiece();
  throw CheckpointError(fmt::format("{}: tokenizer.ggml.model \"{}\" is not supported; known: gpt2, llama",
                                    file.path().string(), kind));
}

}  // namespace caldera
