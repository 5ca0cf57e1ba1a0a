// Writing GGUF files (version 3, little endian): metadata first, then each tensor's bytes as they are made,
// so that memory stays flat. The reader is base/gguf.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace caldera {

// ggml's tensor types, as far as they are written.
enum class GgmlType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30
};
// How a type packs its elements; a row is whole blocks.
struct GgmlBlock {
  const char* name;
  int64_t elements, bytes;
};
GgmlBlock ggml_block(GgmlType type);
inline constexpr int64_t kQ8BlockElements = 32, kQ8BlockBytes = 34;

// A metadata value. llama.cpp insists on the type of each: sizes are uint32, lists of ids and types int32.
using GgufField = std::variant<uint32_t, float, bool, std::string, std::vector<int32_t>, std::vector<float>,
                               std::vector<std::string>>;
using GgufFields = std::vector<std::pair<std::string, GgufField>>;

struct GgufTensorToWrite {
  std::string name;            // at most 63 bytes, which is what ggml has room for
  std::vector<int64_t> shape;  // row-major, at most 4 dimensions; rows are whole blocks
  GgmlType type = GgmlType::kF32;
  std::function<std::vector<std::byte>()> bytes;  // called once, when it is this tensor's turn
};

// Bytes that a tensor of this shape takes.
uint64_t ggml_bytes(const std::vector<int64_t>& shape, GgmlType type);

// Writes the file atomically, tensors in the order given. Throws Error with the file and the tensor for a
// name or shape that GGUF cannot hold, or where bytes() gives another number of bytes than the shape takes.
void write_gguf(const std::filesystem::path& file, const GgufFields& fields,
                const std::vector<GgufTensorToWrite>& tensors);

}  // namespace caldera
