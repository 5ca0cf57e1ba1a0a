// GGUF container: metadata and tensor table (llama.cpp's format, versions 2 and 3, little endian). Shared by model/ (the
// weights) and data/ (the tokenizer inside). Every length is checked against the file's size before it is used.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "base/files.h"

namespace caldera {

// The types of metadata values, by the numbers that files have for them.
enum GgufValueType : uint32_t {
  kGgufU8, kGgufI8, kGgufU16, kGgufI16, kGgufU32, kGgufI32, kGgufF32, kGgufBool, kGgufString, kGgufArray, kGgufU64, kGgufI64,
  kGgufF64
};

// A metadata value: numbers widen to int64_t or double; arrays are homogeneous.
using GgufValue = std::variant<int64_t, double, bool, std::string, std::vector<int64_t>, std::vector<double>,
                               std::vector<bool>, std::vector<std::string>>;

struct GgufTensor {
  std::string name;
  std::vector<int64_t> shape;  // row-major (torch's order: the file's dims reversed)
  uint32_t type = 0;           // ggml type: 0 F32, 1 F16, 2 Q4_0, 3 Q4_1, 8 Q8_0, 30 BF16
  std::span<const std::byte> bytes;  // in the map
};

class GgufFile {
 public:
  explicit GgufFile(const std::filesystem::path& path);  // throws CheckpointError naming file and what is malformed
  const std::filesystem::path& path() const { return map_.path(); }
  bool has(const std::string& key) const { return metadata_.contains(key); }
  // Typed access; throws CheckpointError naming the key, the type wanted and the type found.
  template <class T>
  const T& get(const std::string& key) const;
  template <class T>
  T get_or(const std::string& key, T fallback) const { return has(key) ? get<T>(key) : fallback; }
  const std::map<std::string, GgufValue>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }

 private:
  MappedFile map_;
  std::map<std::string, GgufValue> metadata_;
  std::vector<GgufTensor> tensors_;
};

}  // namespace caldera
