#include "model/weights/gguf_weights.h"

#include <ATen/Parallel.h>

#include <cstring>

#include "base/error.h"
#include "base/strings.h"

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

// "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; "" for a tensor that a llama does not
// have.
std::string hf_name(const std::string& name) {
  static const std::map<std::string, std::string> kOuter = {
      {"token_embd.weight", "model.embed_tokens.weight"},
      {"output_norm.weight", "model.norm.weight"},
      {"output.weight", "lm_head.weight"}};
  static const std::map<std::string, std::string> kInBlock = {
      {"attn_q", "self_attn.q_proj"},          {"attn_k", "self_attn.k_proj"},
      {"attn_v", "self_attn.v_proj"},          {"attn_output", "self_attn.o_proj"},
      {"ffn_gate", "mlp.gate_proj"},           {"ffn_up", "mlp.up_proj"},
      {"ffn_down", "mlp.down_proj"},           {"attn_norm", "input_layernorm"},
      {"ffn_norm", "post_attention_layernorm"}};
  if (const auto outer = kOuter.find(name); outer != kOuter.end()) return outer->second;
  const std::vector<std::string> parts = split(name, ".");  // blk, index, part, weight or bias
  if (parts.size() != 4 || parts[0] != "blk" || (parts[3] != "weight" && parts[3] != "bias")) return "";
  const auto inner = kInBlock.find(parts[2]);
  return inner == kInBlock.end() ? ""
                                 : fmt::format("model.layers.{}.{}.{}", parts[1], inner->second, parts[3]);
}

// llama.cpp rotates neighbouring rows, HF the two halves of a head: rows [H, K/2, 2] go back to [H, 2, K/2].
at::Tensor undo_rotary_order(const at::Tensor& rows, int64_t num_heads) {
  const int64_t half = rows.size(0) / num_heads / 2, columns = rows.numel() / rows.size(0);
  return rows.reshape({num_heads, half, 2, columns}).transpose(1, 2).reshape(rows.sizes());
}

class GgufWeights : public TensorSource {
 public:
  GgufWeights(std::shared_ptr<GgufFile> file, int64_t num_heads, int64_t num_key_value_heads)
      : file_(std::move(file)), num_heads_(num_heads), num_key_value_heads_(num_key_value_heads) {
    for (const GgufTensor& tensor : file_->tensors()) {
      const std::string name = hf_name(tensor.name);
      CALDERA_CHECK(!name.empty(), CheckpointError, "{}: tensor {} has no place in architecture llama",
                    file_->path().string(), tensor.name);
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
    if (name.find(".q_proj.") != std::string::npos) return undo_rotary_order(values, num_heads_);
    if (name.find(".k_proj.") != std::string::npos) return undo_rotary_order(values, num_key_value_heads_);
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

class MetadataReader {
 public:
  explicit MetadataReader(const GgufFile& file) : file_(file) {}
  std::string key(const char* name) const { return std::string("llama.") + name; }
  int64_t size(const char* name, std::optional<int64_t> fallback = {}) const {
    const int64_t value =
        fallback ? file_.get_or<int64_t>(key(name), *fallback) : file_.get<int64_t>(key(name));
    CALDERA_CHECK(value > 0 && value <= (1 << 30), CheckpointError,
                  "{}: {}: expected a positive size, got {}", file_.path().string(), key(name), value);
    return value;
  }
  double number(const char* name, double fallback) const { return file_.get_or<double>(key(name), fallback); }
  std::string text(const char* name) const { return file_.get_or<std::string>(key(name), ""); }

 private:
  const GgufFile& file_;
};

Json make_config(const GgufFile& file) {
  const std::string where = file.path().string();
  const MetadataReader read(file);
  std::map<std::string, const GgufTensor*> tensors;
  for (const GgufTensor& tensor : file.tensors()) tensors[tensor.name] = &tensor;
  const auto expect_shape = [&](const std::string& name, const std::vector<int64_t>& expected) {
    const auto found = tensors.find(name);
    CALDERA_CHECK(found != tensors.end(), CheckpointError, "{}: tensor {} is missing", where, name);
    CALDERA_CHECK(found->second->shape == expected, CheckpointError, "{}: {}: expected shape [{}], got [{}]",
                  where, name, fmt::join(expected, ", "), fmt::join(found->second->shape, ", "));
  };

  const int64_t width = read.size("embedding_length"), layers = read.size("block_count");
  const auto embedding = tensors.find("token_embd.weight");
  CALDERA_CHECK(embedding != tensors.end() && embedding->second->shape.size() == 2, CheckpointError,
                "{}: token_embd.weight is missing or no matrix", where);
  const int64_t vocab = embedding->second->shape[0];
  // What the metadata claim is held against the tensors before anything is allocated by it.
  expect_shape("token_embd.weight", {vocab, width});
  const int64_t heads = read.size("attention.head_count"),
                kv_heads = read.size("attention.head_count_kv", heads);
  const int64_t head_dim = read.size("attention.key_length", width / heads);
  const int64_t rotated = read.size("rope.dimension_count", head_dim);
  CALDERA_CHECK(head_dim == rotated && head_dim % 2 == 0, CheckpointError,
                "{}: llama.rope.dimension_count: expected the heads' width {} (even), got {}", where,
                head_dim, rotated);
  CALDERA_CHECK(!file.has("llama.expert_count") || file.get<int64_t>("llama.expert_count") == 0,
                CheckpointError, "{}: mixtures of experts are not supported", where);
  CALDERA_CHECK(!tensors.contains("rope_freqs.weight"), CheckpointError,
                "{}: rope_freqs.weight: rotary frequencies scaled one by one are not supported", where);
  const int64_t mlp_width = read.size("feed_forward_length");
  expect_shape("blk.0.ffn_gate.weight", {mlp_width, width});
  expect_shape("blk.0.attn_q.weight", {heads * head_dim, width});
  expect_shape("blk.0.attn_k.weight", {kv_heads * head_dim, width});
  expect_shape(fmt::format("blk.{}.ffn_gate.weight", layers - 1), {mlp_width, width});

  Json config = {{"architectures", {"LlamaForCausalLM"}},
                 {"model_type", "llama"},
                 {"hidden_size", width},
                 {"intermediate_size", mlp_width},
                 {"num_hidden_layers", layers},
                 {"num_attention_heads", heads},
                 {"num_key_value_heads", kv_heads},
                 {"head_dim", head_dim},
                 {"hidden_act", "silu"},
                 {"rms_norm_eps", read.number("attention.layer_norm_rms_epsilon", 1e-6)},
                 {"rope_theta", read.number("rope.freq_base", 10000.0)},
                 {"max_position_embeddings", read.size("context_length")},
                 {"vocab_size", vocab},
                 {"attention_bias", tensors.contains("blk.0.attn_q.bias")},
                 {"tie_word_embeddings", !tensors.contains("output.weight")}};
  if (const std::string scaling = read.text("rope.scaling.type"); !scaling.empty() && scaling != "none")
    config["rope_scaling"] = {{"rope_type", scaling}, {"factor", read.number("rope.scaling.factor", 1.0)}};
  for (const char* token : {"bos", "eos"}) {
    const std::string key = fmt::format("tokenizer.ggml.{}_token_id", token);
    if (file.has(key)) config[fmt::format("{}_token_id", token)] = file.get<int64_t>(key);
  }
  return config;
}

}  // namespace

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
  CALDERA_CHECK(decoder.architecture == "llama", CheckpointError,
                "{}: general.architecture: only llama is supported, got {}", path.string(),
                decoder.architecture);
  decoder.config = make_config(*file);
  decoder.weights = std::make_unique<GgufWeights>(file, decoder.config["num_attention_heads"].get<int64_t>(),
                                                  decoder.config["num_key_value_heads"].get<int64_t>());
  return decoder;
}

}  // namespace caldera
