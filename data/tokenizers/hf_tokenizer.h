// What all tokenizers have in common whose folder or file is as Hugging Face writes it: the configuration
// decides on special and added tokens, a model behind it on all others.
#pragma once
#include <algorithm>
#include <string>
#include <string_view>
#include <utility>

#include "data/tokenizer.h"
#include "data/tokenizers/hf_config.h"

namespace caldera {

class HfTokenizer : public Tokenizer {
 public:
  int64_t token_id(std::string_view token) const override {
    const AddedToken* added = config_.find_added(token);
    return added != nullptr ? added->id : model_id(token);
  }
  bool takes_space_behind(int64_t id) const override {
    const AddedToken* added = config_.find_added(id);
    return added != nullptr && added->rstrip;
  }
  int64_t vocab_size() const override {
    return std::max(model_size(), config_.added_tokens.empty() ? 0 : config_.added_tokens.back().id + 1);
  }
  int64_t bos_id() const override { return named_id(config_.bos_token); }
  int64_t eos_id() const override { return named_id(config_.eos_token); }
  int64_t pad_id() const override { return named_id(config_.pad_token); }
  const std::string& chat_template() const override { return config_.chat_template; }

 protected:
  explicit HfTokenizer(TokenizerConfig config) : config_(std::move(config)) {}
  // Of the model alone: a token's id, -1 where it has none, and one past the largest id.
  virtual int64_t model_id(std::string_view token) const = 0;
  virtual int64_t model_size() const = 0;

  // -1 for a token that is not named.
  int64_t named_id(const std::string& token) const { return token.empty() ? -1 : token_id(token); }
  // The placeholder's id, which it gets in what is saved where it has none.
  int64_t placeholder_id() const {
    const int64_t id = token_id(kImagePlaceholder);
    return id >= 0 ? id : vocab_size();
  }

  TokenizerConfig config_;
};

}  // namespace caldera
