#include "model/weights/gguf_weights.h"

#include <ATen/Parallel.h>

#include <cstring>

#include "base/error.h"
#include "base/strings.h"
#include "model/weights/gguf_config.h"
#include "model/weights/gguf_names.h"

namespace caldera {
namespace {

enum : uint32_t { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kBF16 = 30 };
constexpr int64_t kBlock = 32;  // elements of one block of the quantised types

float half_at(const std::byte* bytes) {
  c10::Half value;
  std::memcpy(&value, bytes, sizeof value);
  return static_cast<float>(value);
}

// One block of 32 elements: ggml's scale (and offset), then the quants; of two 4-bit quants in a byte the low
// one is element j, the high one element j + 16.
void unpack_q4_0(const std::byte* block, float* out) {
  const float scale = half_at(block);
  for (int64_t j = 0; j < kBlock / 2; ++j) {
    const int byte = std::to_integer<int>(block[2 + j]);
    out[j] = static_cast<float>((byte & 15) - 8) * scale;
    out[j + kBlock / 2] = static_cast<float>((byte >> 4) - 8) * scale;
  }
}

void unpack_q4_1(const std::byte* block, float* out) {
  const float scale = half_at(block), offset = half_at(block + 2);
  for (int64_t j = 0; j < kBlock / 2; ++j) {
    const int byte = std::to_integer<int>(block[4 + j]);
    out[j] = static_cast<float>(byte & 15) * scale + offset;
    out[j + kBlock / 2] = static_cast<float>(byte >> 4) * scale + offset;
  }
}

void unpack_q8_0(const std::byte* block, float* out) {
  const float scale = half_at(block);
  for (int64_t j = 0; j < kBlock; ++j)
    out[j] = static_cast<float>(std::to_integer<int8_t>(block[2 + j])) * scale;
}

at::Tensor unpack(const GgufTensor& tensor, int64_t block_bytes,
                  void (*unpack_block)(const std::byte*, float*)) {
  at::Tensor out = at::empty(tensor.shape, at::kFloat);
  float* elements = out.mutable_data_ptr<float>();
  at::parallel_for(0, out.numel() / kBlock, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      unpack_block(tensor.bytes.data() + i * block_bytes, elements + i * kBlock);
  });
  return out;
}

at::Tensor copy_bytes(const GgufTensor& tensor, at::ScalarType type) {
  at::Tensor out = at::empty(tensor.shape, type);
  CALDERA_ASSERT(out.nbytes() == tensor.bytes.size());
  std::memcpy(out.mutable_data_ptr(), tensor.bytes.data(), tensor.bytes.size());
  return out;
}

class GgufWeights : public TensorSource {
 public:
  // Heads of q and k whose rows llama.cpp has in its own order; 0 where it keeps HF's.
  GgufWeights(std::shared_ptr<GgufFile> file, const std::function<std::string(const std::string&)>& hf_name,
              int64_t num_heads = 0, int64_t num_key_value_heads = 0)
      : file_(std::move(file)), num_heads_(num_heads), num_key_value_heads_(num_key_value_heads) {
    for (const GgufTensor& tensor : file_->tensors()) {
      if (tensor.name == kGgufRopeDivisors) continue;  // they are in the configuration
      const std::string name = hf_name(tensor.name);
      CALDERA_CHECK(!name.empty(), CheckpointError, "{}: tensor {} has no place in architecture {}",
                    file_->path().string(), tensor.name, file_->get<std::string>("general.architecture"));
      tensors_[name] = &tensor;
    }
  }
  std::vector<std::string> names() const override {
    std::vector<std::string> result;
    for (const auto& [name, tensor] : tensors_) result.push_back(name);
    return result;
  }
  bool has(const std::string& name) const override { return tensors_.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const override { return tensor(name).shape; }
  std::string where(const std::string&) const override { return file_->path().string(); }
  at::Tensor read(const std::string& name) const override {
    const at::Tensor values = dequantize(tensor(name), file_->path().string());
    if (num_heads_ == 0) return values;
    if (name.find(".q_proj.") != std::string::npos) return from_neighbour_order(values, num_heads_);
    if (name.find(".k_proj.") != std::string::npos) return from_neighbour_order(values, num_key_value_heads_);
    return values;
  }

 private:
  const GgufTensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    CALDERA_CHECK(found != tensors_.end(), CheckpointError, "{}: no tensor for {}", file_->path().string(),
                  name);
    return *found->second;
  }
  std::shared_ptr<GgufFile> file_;
  int64_t num_heads_, num_key_value_heads_;
  std::map<std::string, const GgufTensor*> tensors_;
};

}  // namespace

std::unique_ptr<TensorSource> open_gguf_tensors(
    std::shared_ptr<GgufFile> file, const std::function<std::string(const std::string&)>& hf_name) {
  return std::make_unique<GgufWeights>(std::move(file), hf_name);
}

at::Tensor dequantize(const GgufTensor& tensor, const std::string& where) {
  switch (tensor.type) {
    case kF32:
      return copy_bytes(tensor, at::kFloat);
    case kF16:
      return copy_bytes(tensor, at::kHalf);
    case kBF16:
      return copy_bytes(tensor, at::kBFloat16);
    case kQ4_0:
      return unpack(tensor, 18, unpack_q4_0);
    case kQ4_1:
      return unpack(tensor, 20, unpack_q4_1);
    case kQ8_0:
      return unpack(tensor, 34, unpack_q8_0);
    default:
      break;
  }
  throw CheckpointError(
      fmt::format("{}: {}: ggml type {} is not supported; F32 (0), F16 (1), Q4_0 (2), Q4_1 (3), Q8_0 (8) and "
                  "BF16 (30) are",
                  where, tensor.name, tensor.type));
}

GgufDecoder open_gguf_decoder(const fs::path& path) {
  auto file = std::make_shared<GgufFile>(path);
  GgufDecoder decoder;
  decoder.architecture = file->get<std::string>("general.architecture");
  std::vector<std::string> known;
  const GgufArchitecture* architecture = nullptr;
  for (const GgufArchitecture& candidate : gguf_architectures()) {
    known.emplace_back(candidate.name);
    if (decoder.architecture == candidate.name) architecture = &candidate;
  }
  CALDERA_CHECK(architecture != nullptr, CheckpointError,
                "{}: general.architecture: expected one of {}, got {}", path.string(), join(known, ", "),
                decoder.architecture);
  decoder.config = gguf_decoder_config(*file, *architecture);
  const auto heads = [&](const char* key) {
    return architecture->rotates_neighbours ? decoder.config[key].get<int64_t>() : 0;
  };
  decoder.weights =
      std::make_unique<GgufWeights>(file, hf_decoder_name, heads("num_attention_heads"), heads("num_key_value_heads"));
  return decoder;
}

}  // namespace caldera
