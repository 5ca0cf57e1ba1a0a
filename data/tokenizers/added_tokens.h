// Added tokens that are not special ("<think>", "<box>"): a text that holds one is cut there, and the token
// is one id, as in HF's tokenizers. Special ones stay plain text in data.
#pragma once
#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"
#include "data/tokenizers/hf_config.h"

namespace caldera {

class AddedTokenFinder {
 public:
  AddedTokenFinder() = default;
  // Of the configuration's added tokens those that are neither special nor one of its named ones (eos, ...),
  // and for which `is_own` is false: a tokenizer's own machinery may know them.
  explicit AddedTokenFinder(const TokenizerConfig& config, const std::function<bool(int64_t)>& is_own = {});

  // The tokens of a text; `plain` encodes what lies between added ones. Of several that begin at a place the
  // longest is taken. With lstrip and rstrip a token takes the white space beside it along.
  using Encode = std::function<std::vector<Token>(std::string_view, TextContext)>;
  std::vector<Token> encode(std::string_view text, TextContext context, const Encode& plain) const;

 private:
  struct Match {
    size_t begin = 0, end = 0;  // with the white space
    const AddedToken* token = nullptr;
  };
  Match find(std::string_view text, size_t begin) const;

  std::vector<AddedToken> tokens_;
  std::array<std::vector<size_t>, 256> by_first_byte_;  // into tokens_, longest first
};

}  // namespace caldera
