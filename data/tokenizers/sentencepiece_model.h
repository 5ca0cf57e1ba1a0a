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

// Throws CheckpointError "WHERE: what" unless the bytes are a BPE or unigram model with an identity
// normaliser (LLaMA's kind) whose every field lies inside the file, with one unknown piece and a sane number
// of distinct, non-empty pieces. Returns whether it is a BPE model.
bool check_sentencepiece_model(std::string_view proto, const std::string& where);

// A BPE model with LLaMA's flags from pieces that came from elsewhere (GGUF).
std::string make_sentencepiece_model(const std::vector<Piece>& pieces, bool add_dummy_prefix);

// Bytes which, appended to a model, switch its dummy prefix off: a repeated message field merges into the
// first one.
inline constexpr std::string_view kWithoutDummyPrefix{"\x1a\x02\x18\x00", 4};

}  // namespace caldera
