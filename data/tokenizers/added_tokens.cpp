#include "data/tokenizers/added_tokens.h"

#include <algorithm>

#include "base/words.h"
#include "data/tokenizers/utf8.h"

namespace caldera {
namespace {

bool is_added_space(char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// Letters, digits and "_" in ASCII; elsewhere all but the blocks of signs, spaces and pictures.
bool is_word_character(char32_t c) {
  if (c < 0x80) return (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z') || c == '_';
  if (c < 0xC0) return c == 0xAA || c == 0xB5 || c == 0xBA;
  return !(c >= 0x2000 && c < 0x2C00) &&
         !(c >= 0x3000 && c < 0x3021 && c != 0x3005 && c != 0x3006 && c != 0x3007) &&
         !(c >= 0x1F000 && c < 0x1FB00) && c != 0xD7 && c != 0xF7;
}

bool ends_with_word(std::string_view text) {
  size_t at = text.size();
  while (at > 0 && (static_cast<unsigned char>(text[--at]) & 0xC0) == 0x80) {
  }
  return !text.empty() && is_word_character(next_code_point(text, at));
}
bool begins_with_word(std::string_view text) {
  size_t at = 0;
  return !text.empty() && is_word_character(next_code_point(text, at));
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(const TokenizerConfig& config,
                                   const std::function<bool(int64_t)>& is_own) {
  for (const AddedToken& token : config.added_tokens) {
    const bool is_named = token.content == config.bos_token || token.content == config.eos_token ||
                          token.content == config.unk_token || token.content == config.pad_token ||
                          token.content == kImagePlaceholder;
    if (!token.special && !is_named && !token.content.empty() && !(is_own && is_own(token.id)))
      tokens_.push_back(token);
  }
  for (size_t i = 0; i < tokens_.size(); ++i)
    by_first_byte_[static_cast<unsigned char>(tokens_[i].content[0])].push_back(i);
  for (std::vector<size_t>& list : by_first_byte_)
    std::stable_sort(list.begin(), list.end(), [this](size_t a, size_t b) {
      return tokens_[a].content.size() > tokens_[b].content.size();
    });
}

AddedTokenFinder::Match AddedTokenFinder::find(std::string_view text, size_t begin) const {
  for (size_t at = begin; at < text.size(); ++at) {
    for (const size_t i : by_first_byte_[static_cast<unsigned char>(text[at])]) {
      const AddedToken& token = tokens_[i];
      if (!text.substr(at).starts_with(token.content)) continue;
      Match match{at, at + token.content.size(), &token};
      // As HF's library: what the longest match is decides first, then whether it stands alone.
      if (token.single_word &&
          (ends_with_word(text.substr(0, at)) || begins_with_word(text.substr(match.end)))) {
        at = match.end - 1;
        break;
      }
      while (token.lstrip && match.begin > begin && is_added_space(text[match.begin - 1])) --match.begin;
      while (token.rstrip && match.end < text.size() && is_added_space(text[match.end])) ++match.end;
      return match;
    }
  }
  return {text.size(), text.size(), nullptr};
}

std::vector<Token> AddedTokenFinder::encode(std::string_view text, TextContext context,
                                            const Encode& plain) const {
  if (tokens_.empty()) return plain(text, context);
  std::vector<Token> tokens;
  for (size_t begin = 0; begin < text.size();) {
    const Match match = find(text, begin);
    if (match.begin > begin) {
      const auto shift = static_cast<int64_t>(begin);
      for (const Token& token : plain(text.substr(begin, match.begin - begin), context))
        tokens.push_back({token.id, token.begin + shift, token.end + shift});
    }
    if (match.token == nullptr) break;
    tokens.push_back({match.token->id, static_cast<int64_t>(match.begin), static_cast<int64_t>(match.end)});
    begin = match.end;
    context = TextContext::kAfterControl;
  }
  return tokens;
}

}  // namespace caldera
