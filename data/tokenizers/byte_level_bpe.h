// BPE as a tokenizer.json has it, GPT-2's over bytes or SentencePiece's over characters: the vocabulary, its
// merges, and how a text is cut into words before they apply.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "data/tokenizers/hf_config.h"
#include "data/tokenizers/word_cache.h"

namespace caldera {

// One step of cutting a text: every match of the pattern, and every stretch between matches, becomes a piece
// of its own.
struct SplitStep {
  enum class Kind {
    kDigits,     // HF's Digits(individual_digits=true)
    kSplit,      // HF's Split(pattern, "isolated")
    kByteLevel,  // HF's ByteLevel, which brings GPT-2's pattern
  };
  Kind kind = Kind::kSplit;
  std::string pattern;  // PCRE2, of kSplit

  bool operator==(const SplitStep&) const = default;
};

// GPT-2's pattern, by which HF's ByteLevel cuts unless told not to.
extern const char* const kGpt2Pattern;

// How a model of the SentencePiece kind makes symbols of a text, instead of the byte-level alphabet.
struct CharacterBpe {
  bool byte_fallback = false, fuse_unknown = false;
  int64_t unknown = -1;  // its id
  // When a text is given a visible space in front.
  enum class Prefix {
    kNever,
    kFirst,   // at a text's beginning, where there is none (Metaspace "first")
    kAlways,  // after each added token as well (Metaspace "always")
    kAnyway,  // the same, and where there is one already (Prepend)
  };
  Prefix prefix = Prefix::kNever;
  bool splits_words = false;                // merges stop at every space
  bool strips_space = false;                // decoding takes the first space off
  Json normalizer, pre_tokenizer, decoder;  // as the file has them
};

struct BpeModel {
  std::vector<std::string>
      tokens;  // by id, in the byte-level alphabet (or as text); "" where an id is not used
  std::vector<std::pair<int32_t, int32_t>> merges;  // pairs of ids, first come first merged
  std::vector<SplitStep> steps;
  bool nfc = false;            // Unicode's composed form before all
  bool ignore_merges = false;  // a word that is a token is that token, whatever the merges make of it
  bool adds_bos = false;
  std::optional<CharacterBpe> characters;  // none: byte-level
};

// The byte-level alphabet: each byte is a printable character (GPT-2's bytes_to_unicode).
std::string bytes_to_alphabet(std::string_view bytes);
// Back again. Characters outside the alphabet stand for themselves, as in HF's decoder.
std::string alphabet_to_bytes(std::string_view text);

// Applies the merges to one word: the lowest-ranked pair first, the leftmost of equals.
class BpeMerger {
 public:
  // Throws CheckpointError "WHERE: ..." where a merge's result is not a token. Added tokens never come out of
  // a text.
  BpeMerger(const BpeModel& model, const std::vector<AddedToken>& added_tokens, const std::string& where);
  std::vector<WordToken> merge(std::string_view word) const;

 private:
  // The symbols a word begins as: its bytes, or its characters.
  std::vector<WordToken> symbols_of(std::string_view word) const;
  void add_character(std::string_view word, size_t begin, size_t end, std::vector<WordToken>& symbols) const;

  struct Merge {
    int32_t rank = 0, id = 0;
  };
  static uint64_t key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  std::array<int32_t, 256>
      byte_ids_{};  // -1 where the vocabulary has no token for a byte: such bytes are left out, as HF does
  std::unordered_map<uint64_t, Merge> merges_;
  std::optional<CharacterBpe> characters_;
  std::unordered_map<std::string, int32_t> character_ids_;
  std::unordered_map<std::string, int32_t> words_;  // with ignore_merges: whole words, as bytes
};

// Cuts texts into words. Thread-safe.
class WordSplitter {
 public:
  // Throws CheckpointError "WHERE: ..." for a pattern that does not compile.
  WordSplitter(const std::vector<SplitStep>& steps, const std::string& where);
  ~WordSplitter();
  WordSplitter(const WordSplitter&) = delete;
  WordSplitter& operator=(const WordSplitter&) = delete;
  // Offsets [begin, end) of the words of a valid UTF-8 text, in order; together they cover it.
  std::vector<std::pair<size_t, size_t>> split(std::string_view text) const;

 private:
  struct Pattern;
  std::vector<std::unique_ptr<Pattern>> patterns_;
};

}  // namespace caldera
