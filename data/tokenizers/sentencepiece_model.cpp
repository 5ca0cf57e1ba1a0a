#include "data/tokenizers/sentencepiece_model.h"

#include <bit>
#include <cstring>
#include <unordered_set>

#include "base/error.h"
#include "data/tokenizers/utf8.h"

namespace caldera {
namespace {

constexpr size_t kMaxPieces = 1u << 21;
constexpr size_t kMaxPieceBytes = 4096;

// One field of a protobuf message at a time. Groups (wire types 3 and 4) do not occur in this format.
class ProtoReader {
 public:
  ProtoReader(std::string_view bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  // Moves to the next field; false at the end.
  bool next() {
    if (bytes_.empty()) return false;
    const uint64_t tag = varint();
    number = tag >> 3;
    wire_type = static_cast<int>(tag & 7);
    check(number > 0, "a field number is zero");
    if (wire_type == 0) {
      value = varint();
    } else if (wire_type == 1) {
      fixed(8);
    } else if (wire_type == 2) {
      const uint64_t length = varint();
      check(length <= bytes_.size(), "a field reaches beyond the end");
      data = bytes_.substr(0, length);
      bytes_.remove_prefix(length);
    } else if (wire_type == 5) {
      fixed(4);
    } else {
      check(false, "an unknown wire type");
    }
    return true;
  }
  void expect(int type) const { check(wire_type == type, "a field has the wrong wire type"); }
  void check(bool condition, const char* what) const {
    CALDERA_CHECK(condition, CheckpointError, "{}: not a SentencePiece model: {}", where_, what);
  }

  uint64_t number = 0;
  int wire_type = 0;
  uint64_t value = 0;     // wire type 0
  std::string_view data;  // wire types 1, 2 and 5

 private:
  uint64_t varint() {
    uint64_t result = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      check(!bytes_.empty(), "it is cut off inside a number");
      const auto byte = static_cast<unsigned char>(bytes_.front());
      bytes_.remove_prefix(1);
      result |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return result;
    }
    check(false, "a number is longer than 64 bits");
    return 0;
  }
  void fixed(size_t num_bytes) {
    check(bytes_.size() >= num_bytes, "it is cut off inside a number");
    data = bytes_.substr(0, num_bytes);
    bytes_.remove_prefix(num_bytes);
  }

  std::string_view bytes_;
  const std::string& where_;
};

struct CheckedPiece {
  std::string_view text;
  PieceType type = PieceType::kNormal;
};

CheckedPiece check_piece(std::string_view message, const std::string& where,
                         std::unordered_set<std::string_view>& seen) {
  ProtoReader reader(message, where);
  std::string_view text;
  auto type = PieceType::kNormal;
  while (reader.next()) {
    if (reader.number == 1) {
      reader.expect(2);
      text = reader.data;
    } else if (reader.number == 2) {
      reader.expect(5);
    } else if (reader.number == 3) {
      reader.expect(0);
      reader.check(reader.value >= 1 && reader.value <= 6, "a piece is of an unknown type");
      type = static_cast<PieceType>(reader.value);
    }
  }
  reader.check(!text.empty() && text.size() <= kMaxPieceBytes, "a piece is empty or longer than 4096 bytes");
  reader.check(text.find('\0') == std::string_view::npos && is_valid_utf8(text), "a piece is not text");
  reader.check(seen.insert(text).second, "a piece occurs twice");
  return {text, type};
}

// Whether the piece reaches from one word into the next.
bool joins_words(std::string_view piece) {
  while (piece.starts_with(kVisibleSpace)) piece.remove_prefix(kVisibleSpace.size());
  return piece.find(kVisibleSpace) != std::string_view::npos;
}

// What the model says of itself, with the format's defaults; a field that comes again replaces.
struct Flags {
  uint64_t model_type = 1;
  bool spaces_end_words = false, add_dummy_prefix = true, remove_extra_spaces = true, escape_spaces = true;
};

void check_trainer(std::string_view message, const std::string& where, Flags& flags) {
  ProtoReader reader(message, where);
  while (reader.next()) {
    if (reader.number != 3 && reader.number != 24) continue;
    reader.expect(0);
    if (reader.number == 3)
      flags.model_type = reader.value;
    else
      flags.spaces_end_words = reader.value != 0;
  }
  const uint64_t model_type = flags.model_type;
  CALDERA_CHECK(model_type == 1 || model_type == 2, CheckpointError,
                "{}: SentencePiece model type {} is not supported; expected BPE (2) or unigram (1)", where,
                model_type);
}

// The compiled normalisation table is a trie whose offsets the library follows unchecked. LLaMA's kind has
// none.
void check_normalizer(std::string_view message, const std::string& where, Flags& flags) {
  ProtoReader reader(message, where);
  while (reader.next()) {
    if (reader.number >= 3 && reader.number <= 5) {
      reader.expect(0);
      bool& flag = reader.number == 3   ? flags.add_dummy_prefix
                   : reader.number == 4 ? flags.remove_extra_spaces
                                        : flags.escape_spaces;
      flag = reader.value != 0;
    }
    if (reader.number != 2) continue;
    reader.expect(2);
    CALDERA_CHECK(reader.data.empty(), CheckpointError,
                  "{}: a SentencePiece model with a normalisation table is not supported; expected the "
                  "identity normaliser, "
                  "as LLaMA's models have",
                  where);
  }
}

void put_varint(std::string& bytes, uint64_t value) {
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(static_cast<unsigned char>(value | 0x80));
  bytes += static_cast<char>(value);
}
void put_number(std::string& bytes, uint64_t field, uint64_t value) {
  put_varint(bytes, field << 3);
  put_varint(bytes, value);
}
void put_bytes(std::string& bytes, uint64_t field, std::string_view value) {
  put_varint(bytes, field << 3 | 2);
  put_varint(bytes, value.size());
  bytes += value;
}

}  // namespace

SentencePieceKind check_sentencepiece_model(std::string_view proto, const std::string& where) {
  ProtoReader reader(proto, where);
  std::unordered_set<std::string_view> seen;
  size_t num_unknown = 0;
  bool knows_space = false, pieces_keep_to_words = true;
  Flags flags, denormalizer;
  std::vector<int64_t> user_defined;
  while (reader.next()) {
    if (reader.number < 1 || reader.number > 5) continue;
    reader.expect(2);
    if (reader.number == 1) {
      reader.check(seen.size() < kMaxPieces, "it has more than two million pieces");
      const CheckedPiece piece = check_piece(reader.data, where, seen);
      if (piece.type == PieceType::kUnknown) ++num_unknown;
      if (piece.type == PieceType::kUserDefined) user_defined.push_back(static_cast<int64_t>(seen.size()) - 1);
      if (piece.text == kVisibleSpace) knows_space = piece.type == PieceType::kNormal;
      if (piece.type == PieceType::kUserDefined || joins_words(piece.text)) pieces_keep_to_words = false;
    } else if (reader.number == 2) {
      check_trainer(reader.data, where, flags);
    } else if (reader.number == 3) {
      check_normalizer(reader.data, where, flags);
    } else if (reader.number == 5) {
      check_normalizer(reader.data, where, denormalizer);
    }
  }
  reader.check(!seen.empty(), "it has no pieces");
  reader.check(num_unknown == 1, "it has not exactly one unknown piece");
  const bool is_bpe = flags.model_type == 2;
  const bool keeps_spaces = flags.escape_spaces && !flags.remove_extra_spaces && !flags.spaces_end_words;
  return {is_bpe, flags.add_dummy_prefix, is_bpe && keeps_spaces && knows_space && pieces_keep_to_words,
          std::ssize(seen), std::move(user_defined)};
}

std::string make_sentencepiece_model(const std::vector<Piece>& pieces, bool add_dummy_prefix) {
  std::string model;
  bool has_bytes = false;
  for (const Piece& piece : pieces) {
    std::string message;
    put_bytes(message, 1, piece.text);
    put_varint(message, 2 << 3 | 5);
    const auto bits = std::bit_cast<uint32_t>(piece.score);
    for (int i = 0; i < 4; ++i) message += static_cast<char>(static_cast<unsigned char>(bits >> (8 * i)));
    put_number(message, 3, static_cast<uint64_t>(piece.type));
    put_bytes(model, 1, message);
    has_bytes = has_bytes || piece.type == PieceType::kByte;
  }
  std::string trainer;
  put_number(trainer, 3, 2);                   // model_type: BPE
  put_number(trainer, 35, has_bytes ? 1 : 0);  // byte_fallback
  put_bytes(model, 2, trainer);
  std::string normalizer;
  put_bytes(normalizer, 1, "identity");
  put_number(normalizer, 3, add_dummy_prefix ? 1 : 0);
  put_number(normalizer, 4, 0);  // remove_extra_whitespaces
  put_number(normalizer, 5, 1);  // escape_whitespaces
  put_bytes(model, 3, normalizer);
  return model;
}

}  // namespace caldera
