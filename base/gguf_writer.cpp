#include "base/gguf_writer.h"

#include <set>
#include <type_traits>

#include "base/error.h"
#include "base/files.h"
#include "base/gguf.h"

namespace caldera {
namespace {

constexpr uint64_t kAlignment = 32;  // GGUF's default; llama.cpp maps tensors in place
constexpr size_t kMaxNameBytes = 63, kMaxDimensions = 4;

template <class T>
constexpr uint32_t type_id() {
  if constexpr (std::is_same_v<T, uint32_t>)
    return kGgufU32;
  else if constexpr (std::is_same_v<T, int32_t>)
    return kGgufI32;
  else if constexpr (std::is_same_v<T, float>)
    return kGgufF32;
  else if constexpr (std::is_same_v<T, bool>)
    return kGgufBool;
  else
    return kGgufString;
}

// The header's bytes: small beside the tensors, so they are gathered before anything is written.
class Bytes {
 public:
  template <class T>
  requires std::is_arithmetic_v<T>
  void add(T value) { text_.append(reinterpret_cast<const char*>(&value), sizeof value); }
  void add(const std::string& value) {
    add<uint64_t>(value.size());
    text_ += value;
  }
  template <class T>
  void add_typed(const T& value) {
    add<uint32_t>(type_id<T>());
    add(value);
  }
  template <class T>
  void add_typed(const std::vector<T>& values) {
    add<uint32_t>(kGgufArray);
    add<uint32_t>(type_id<T>());
    add<uint64_t>(values.size());
    for (const T& value : values) add(value);
  }
  void append(std::string_view raw) { text_ += raw; }
  void pad() { text_.append((kAlignment - text_.size() % kAlignment) % kAlignment, '\0'); }
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

uint64_t padded(uint64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

void check_tensors(const fs::path& file, const std::vector<GgufTensorToWrite>& tensors) {
  std::set<std::string_view> names;
  for (const GgufTensorToWrite& tensor : tensors) {
    CALDERA_CHECK(!tensor.name.empty() && tensor.name.size() <= kMaxNameBytes, Error,
                  "{}: tensor \"{}\": GGUF names have 1 to {} bytes", file.string(), tensor.name,
                  kMaxNameBytes);
    CALDERA_CHECK(names.insert(tensor.name).second, Error, "{}: tensor {} is given twice", file.string(),
                  tensor.name);
    CALDERA_CHECK(!tensor.shape.empty() && tensor.shape.size() <= kMaxDimensions, Error,
                  "{}: {}: GGUF tensors have 1 to {} dimensions, got {}", file.string(), tensor.name,
                  kMaxDimensions, tensor.shape.size());
    for (const int64_t size : tensor.shape)
      CALDERA_CHECK(size > 0, Error, "{}: {}: shape [{}] holds no elements", file.string(), tensor.name,
                    fmt::join(tensor.shape, ", "));
    const GgmlBlock block = ggml_block(tensor.type);
    CALDERA_CHECK(tensor.shape.back() % block.elements == 0, Error,
                  "{}: {}: rows of {} elements are no multiple of {}'s blocks of {}", file.string(),
                  tensor.name, tensor.shape.back(), block.name, block.elements);
  }
}

}  // namespace

GgmlBlock ggml_block(GgmlType type) {
  switch (type) {
    case GgmlType::kF32:
      return {"f32", 1, 4};
    case GgmlType::kF16:
      return {"f16", 1, 2};
    case GgmlType::kBF16:
      return {"bf16", 1, 2};
    case GgmlType::kQ5_0:
      return {"q5_0", 32, 22};
    case GgmlType::kQ5_1:
      return {"q5_1", 32, 24};
    case GgmlType::kQ8_0:
      return {"q8_0", kQ8BlockElements, kQ8BlockBytes};
    case GgmlType::kQ4_K:
      return {"q4_k", 256, 144};
    case GgmlType::kQ5_K:
      return {"q5_k", 256, 176};
    case GgmlType::kQ6_K:
      return {"q6_k", 256, 210};
  }
  assert_failed("known GgmlType", __FILE__, __LINE__);
}

uint64_t ggml_bytes(const std::vector<int64_t>& shape, GgmlType type) {
  uint64_t elements = 1;
  for (const int64_t size : shape) elements *= static_cast<uint64_t>(size);
  const GgmlBlock block = ggml_block(type);
  return elements / static_cast<uint64_t>(block.elements) * static_cast<uint64_t>(block.bytes);
}

void write_gguf(const std::filesystem::path& file, const GgufFields& fields,
                const std::vector<GgufTensorToWrite>& tensors) {
  check_tensors(file, tensors);
  Bytes header;
  header.append("GGUF");
  header.add<uint32_t>(3);
  header.add<uint64_t>(tensors.size());
  header.add<uint64_t>(fields.size());
  std::set<std::string_view> keys;
  for (const auto& [key, value] : fields) {
    CALDERA_CHECK(keys.insert(key).second, Error, "{}: metadata key {} is given twice", file.string(), key);
    header.add(key);
    std::visit([&header](const auto& typed) { header.add_typed(typed); }, value);
  }
  uint64_t offset = 0;
  for (const GgufTensorToWrite& tensor : tensors) {
    header.add(tensor.name);
    header.add<uint32_t>(static_cast<uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size)  // fastest first
      header.add<uint64_t>(static_cast<uint64_t>(*size));
    header.add<uint32_t>(static_cast<uint32_t>(tensor.type));
    header.add<uint64_t>(offset);
    offset += padded(ggml_bytes(tensor.shape, tensor.type));
  }
  header.pad();

  AtomicFile out(file, header.text().size() + offset);
  out.write(header.text());
  const std::string zeros(kAlignment, '\0');
  for (const GgufTensorToWrite& tensor : tensors) {
    const std::vector<std::byte> bytes = tensor.bytes();
    const uint64_t expected = ggml_bytes(tensor.shape, tensor.type);
    CALDERA_CHECK(bytes.size() == expected, Error, "{}: {}: expected {} bytes, got {}", file.string(),
                  tensor.name, expected, bytes.size());
    out.write(bytes.data(), bytes.size());
    out.write(zeros.data(), padded(expected) - expected);
  }
  out.commit();
}

}  // namespace caldera
