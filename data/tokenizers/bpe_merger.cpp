#include <fmt/format.h>

#include <algorithm>
#include <queue>

#include "base/error.h"
#include "data/tokenizers/byte_level_bpe.h"
#include "data/tokenizers/utf8.h"

namespace caldera {
namespace {

// Printable bytes stand for themselves; the others, in order, for U+0100 and up.
struct Alphabet {
  std::array<char32_t, 256> characters{};
  std::unordered_map<char32_t, unsigned char> bytes;
  Alphabet() {
    char32_t next = 256;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      characters[byte] = printable ? byte : next++;
      bytes[characters[byte]] = static_cast<unsigned char>(byte);
    }
  }
};

const Alphabet& alphabet() {
  static const Alphabet instance;
  return instance;
}

}  // namespace

std::string bytes_to_alphabet(std::string_view bytes) {
  std::string text;
  for (const char c : bytes) append_utf8(text, alphabet().characters[static_cast<unsigned char>(c)]);
  return text;
}

std::string alphabet_to_bytes(std::string_view text) {
  std::string bytes;
  for (size_t offset = 0; offset < text.size();) {
    const char32_t character = next_code_point(text, offset);
    const auto found = alphabet().bytes.find(character);
    if (found != alphabet().bytes.end()) {
      bytes += static_cast<char>(found->second);
    } else {
      append_utf8(bytes, character);
    }
  }
  return bytes;
}

BpeMerger::BpeMerger(const BpeModel& model, const std::vector<AddedToken>& added_tokens,
                     const std::string& where) {
  std::unordered_map<std::string_view, int32_t> ids;
  ids.reserve(model.tokens.size());
  for (size_t i = 0; i < model.tokens.size(); ++i) {
    if (!model.tokens[i].empty()) ids.emplace(model.tokens[i], static_cast<int32_t>(i));
  }
  characters_ = model.characters;
  for (size_t byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(static_cast<unsigned char>(byte));
    const auto found = ids.find(characters_ ? fmt::format("<0x{:02X}>", byte) : bytes_to_alphabet({&c, 1}));
    byte_ids_[byte] = found == ids.end() ? -1 : found->second;
  }
  if (characters_) {
    for (const auto& [token, id] : ids) {
      size_t end = 0;
      next_code_point(token, end);
      if (end == token.size()) character_ids_.emplace(token, id);
    }
  }
  merges_.reserve(model.merges.size());
  for (size_t rank = 0; rank < model.merges.size(); ++rank) {
    const auto [left, right] = model.merges[rank];
    const std::string merged =
        model.tokens[static_cast<size_t>(left)] + model.tokens[static_cast<size_t>(right)];
    const auto found = ids.find(merged);
    CALDERA_CHECK(found != ids.end(), CheckpointError,
                  "{}: merge {} makes \"{}\", which is not in the vocabulary", where, rank, merged);
    merges_.insert_or_assign(key(left, right), Merge{static_cast<int32_t>(rank), found->second});
  }
  if (model.ignore_merges) {
    for (const AddedToken& added : added_tokens) ids.erase(added.content);
    for (const auto& [token, id] : ids)
      words_.emplace(characters_ ? std::string(token) : alphabet_to_bytes(token), id);
  }
}

// A character of the vocabulary, its bytes, or the unknown token.
void BpeMerger::add_character(std::string_view word, size_t begin, size_t end,
                              std::vector<WordToken>& symbols) const {
  const auto first = static_cast<int32_t>(begin), last = static_cast<int32_t>(end);
  const auto found = character_ids_.find(std::string(word.substr(begin, end - begin)));
  if (found != character_ids_.end()) {
    symbols.push_back({found->second, first, last});
    return;
  }
  const auto id_of = [&](int32_t i) {
    return byte_ids_[static_cast<unsigned char>(word[static_cast<size_t>(i)])];
  };
  bool has_bytes = characters_->byte_fallback;
  for (int32_t i = first; i < last; ++i) has_bytes = has_bytes && id_of(i) >= 0;
  if (has_bytes) {
    for (int32_t i = first; i < last; ++i) symbols.push_back({id_of(i), i, i + 1});
  } else if (const auto unknown = static_cast<int32_t>(characters_->unknown); unknown >= 0) {
    if (characters_->fuse_unknown && !symbols.empty() && symbols.back().id == unknown)
      symbols.back().end = last;
    else
      symbols.push_back({unknown, first, last});
  }
}

std::vector<WordToken> BpeMerger::symbols_of(std::string_view word) const {
  std::vector<WordToken> symbols;
  for (size_t i = 0; i < word.size();) {
    const size_t begin = i;
    if (characters_) {
      next_code_point(word, i);
      add_character(word, begin, i, symbols);
      continue;
    }
    ++i;
    const int32_t id = byte_ids_[static_cast<unsigned char>(word[begin])];
    if (id >= 0) symbols.push_back({id, static_cast<int32_t>(begin), static_cast<int32_t>(i)});
  }
  return symbols;
}

std::vector<WordToken> BpeMerger::merge(std::string_view word) const {
  if (!words_.empty()) {
    const auto whole = words_.find(std::string(word));
    if (whole != words_.end()) return {{whole->second, 0, static_cast<int32_t>(word.size())}};
  }
  // A doubly linked list over the symbols; a symbol that was merged into its left neighbour has id -1.
  struct Symbol {
    WordToken token;
    int32_t previous, next;
  };
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  for (const WordToken& token : symbols_of(word)) {
    const auto position = static_cast<int32_t>(symbols.size());
    symbols.push_back({token, position - 1, position + 1});
  }
  if (symbols.empty()) return {};
  symbols.back().next = -1;

  struct Candidate {
    int32_t rank, left, left_id, right_id, id;
    bool operator<(const Candidate& other) const {  // std::priority_queue gives the largest first
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };
  std::priority_queue<Candidate> queue;
  const auto consider = [&](int32_t left) {
    if (left < 0) return;
    const Symbol& symbol = symbols[static_cast<size_t>(left)];
    if (symbol.next < 0) return;
    const int32_t right_id = symbols[static_cast<size_t>(symbol.next)].token.id;
    const auto found = merges_.find(key(symbol.token.id, right_id));
    if (found != merges_.end())
      queue.push({found->second.rank, left, symbol.token.id, right_id, found->second.id});
  };
  for (size_t i = 0; i + 1 < symbols.size(); ++i) consider(static_cast<int32_t>(i));
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[static_cast<size_t>(best.left)];
    if (left.token.id != best.left_id || left.next < 0) continue;  // it has been merged since
    Symbol& right = symbols[static_cast<size_t>(left.next)];
    if (right.token.id != best.right_id) continue;
    left.token.id = best.id;
    left.token.end = right.token.end;
    left.next = right.next;
    right.token.id = -1;
    if (left.next >= 0) symbols[static_cast<size_t>(left.next)].previous = best.left;
    consider(left.previous);
    consider(best.left);
  }
  std::vector<WordToken> tokens;
  for (const Symbol& symbol : symbols) {
    if (symbol.token.id >= 0) tokens.push_back(symbol.token);
  }
  return tokens;
}

}  // namespace caldera
