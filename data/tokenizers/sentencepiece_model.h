// A SentencePiece model file (sentencepiece_model.proto) looked at with bounds checks before the library sees
// it: library versions below 0.2.1 trust what a crafted file says (CVE-2026-1260).
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace caldera {

// Kinds of pieces, numbered as in the proto and in GGUF's tokenizer.ggml.token_type.
enum class PieceType : int64_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

struct Piece {
  std::string text;
  float score = 0;
  PieceType type = PieceType::kNormal;
};

// SentencePiece's visible space, which begins a word.
inline constexpr std::string_view kVisibleSpace = "\xE2\x96\x81";  // U+2581

struct SentencePieceKind {
  bool is_bpe = false;  // else unigram
  bool add_dummy_prefix = true;
  // Whether a text's pieces are those of its words side by side, a word being a run of spaces and what
  // follows it up to the next space. So it is in a BPE model where no piece holds a space after something
  // else (merges make nothing but pieces), none is matched before merging, and the normaliser keeps every
  // space.
  bool has_separate_words = false;
  int64_t num_pieces = 0;
  std::vector<int64_t> user_defined;  // ids of the pieces that are matched before merging, ascending
};
// Throws CheckpointError "WHERE: what" unless the bytes are a BPE or unigram model with an identity
// normaliser (LLaMA's kind) whose every field lies inside the file, with one unknown piece and a sane number
// of distinct, non-empty pieces.
SentencePieceKind check_sentencepiece_model(std::string_view proto, const std::string& where);

// A BPE model with LLaMA's flags from pieces that came from elsewhere (GGUF).
std::string make_sentencepiece_model(const std::vector<Piece>& pieces, bool add_dummy_prefix);

// Bytes which, appended to a model, switch its dummy prefix off: a repeated message field merges into the
// first one.
inline constexpr std::string_view kWithoutDummyPrefix{"\x1a\x02\x18\x00", 4};

}  // namespace caldera
