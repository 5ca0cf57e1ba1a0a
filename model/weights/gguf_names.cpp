#include "model/weights/gguf_names.h"

#include <fmt/format.h>

#include "base/strings.h"

namespace caldera {
namespace {

struct Name {
  std::string_view hf, gguf;
};

constexpr Name kDecoder[] = {{"model.embed_tokens.weight", "token_embd.weight"},
                             {"model.norm.weight", "output_norm.weight"},
                             {"lm_head.weight", "output.weight"}};
constexpr Name kDecoderBlock[] = {
    {"self_attn.q_proj", "attn_q"},          {"self_attn.k_proj", "attn_k"},
    {"self_attn.v_proj", "attn_v"},          {"self_attn.o_proj", "attn_output"},
    {"self_attn.q_norm", "attn_q_norm"},     {"self_attn.k_norm", "attn_k_norm"},
    {"mlp.gate_proj", "ffn_gate"},           {"mlp.up_proj", "ffn_up"},
    {"mlp.down_proj", "ffn_down"},           {"input_layernorm", "attn_norm"},
    {"post_attention_layernorm", "ffn_norm"}};
constexpr Name kTower[] = {{"vision_model.embeddings.class_embedding", "v.class_embd"},
                           {"vision_model.embeddings.patch_embedding.weight", "v.patch_embd.weight"},
                           {"vision_model.embeddings.patch_embedding.bias", "v.patch_embd.bias"},
                           {"vision_model.embeddings.position_embedding.weight", "v.position_embd.weight"},
                           {"vision_model.pre_layrnorm.weight", "v.pre_ln.weight"},
                           {"vision_model.pre_layrnorm.bias", "v.pre_ln.bias"},
                           {"vision_model.post_layernorm.weight", "v.post_ln.weight"},
                           {"vision_model.post_layernorm.bias", "v.post_ln.bias"}};
constexpr Name kTowerBlock[] = {{"self_attn.q_proj", "attn_q"}, {"self_attn.k_proj", "attn_k"},
                                {"self_attn.v_proj", "attn_v"}, {"self_attn.out_proj", "attn_out"},
                                {"layer_norm1", "ln1"},         {"layer_norm2", "ln2"},
                                {"mlp.fc1", "ffn_up"},          {"mlp.fc2", "ffn_down"}};
// llama.cpp counts the GELU between the two layers.
constexpr Name kProjector[] = {{"linear_1.weight", "mm.0.weight"},
                               {"linear_1.bias", "mm.0.bias"},
                               {"linear_2.weight", "mm.2.weight"},
                               {"linear_2.bias", "mm.2.bias"}};

std::string find(std::span<const Name> names, std::string_view wanted, std::string_view Name::*from,
                 std::string_view Name::*to) {
  for (const Name& name : names)
    if (name.*from == wanted) return std::string(name.*to);
  return "";
}

bool is_parameter(std::string_view word) { return word == "weight" || word == "bias"; }

// PREFIX.INDEX.MODULE.weight, MODULE of one or several words, with the module's other name in the other
// prefix.
std::string block_name(const std::string& name, std::string_view from_prefix, std::string_view to_prefix,
                       std::span<const Name> modules, std::string_view Name::*from,
                       std::string_view Name::*to) {
  if (!name.starts_with(from_prefix)) return "";
  std::vector<std::string> words = split(name.substr(from_prefix.size()), ".");
  if (words.size() < 3 || !is_parameter(words.back())) return "";
  const std::string index = words.front(), parameter = words.back();
  const std::string module = find(modules, join({words.begin() + 1, words.end() - 1}, "."), from, to);
  return module.empty() ? "" : fmt::format("{}{}.{}.{}", to_prefix, index, module, parameter);
}

}  // namespace

std::span<const GgufArchitecture> gguf_architectures() {
  static const std::vector<GgufArchitecture> all = {
      {"llama", {"llama", "mistral"}, true}, {"qwen2", {"qwen2"}, false}, {"qwen3", {"qwen3"}, false}};
  return all;
}

std::string gguf_decoder_name(const std::string& hf_name) {
  const std::string outer = find(kDecoder, hf_name, &Name::hf, &Name::gguf);
  return outer.empty() ? block_name(hf_name, "model.layers.", "blk.", kDecoderBlock, &Name::hf, &Name::gguf)
                       : outer;
}

std::string hf_decoder_name(const std::string& gguf_name) {
  const std::string outer = find(kDecoder, gguf_name, &Name::gguf, &Name::hf);
  return outer.empty() ? block_name(gguf_name, "blk.", "model.layers.", kDecoderBlock, &Name::gguf, &Name::hf)
                       : outer;
}

std::string gguf_tower_name(const std::string& hf_name) {
  const std::string outer = find(kTower, hf_name, &Name::hf, &Name::gguf);
  return outer.empty() ? block_name(hf_name, "vision_model.encoder.layers.", "v.blk.", kTowerBlock, &Name::hf,
                                    &Name::gguf)
                       : outer;
}

std::string hf_tower_name(const std::string& gguf_name) {
  const std::string outer = find(kTower, gguf_name, &Name::gguf, &Name::hf);
  return outer.empty() ? block_name(gguf_name, "v.blk.", "vision_model.encoder.layers.", kTowerBlock,
                                    &Name::gguf, &Name::hf)
                       : outer;
}

std::string gguf_projector_name(const std::string& name) {
  return find(kProjector, name, &Name::hf, &Name::gguf);
}

std::string hf_projector_name(const std::string& gguf_name) {
  return find(kProjector, gguf_name, &Name::gguf, &Name::hf);
}

at::Tensor to_neighbour_order(const at::Tensor& rows, int64_t num_heads) {
  const int64_t half = rows.size(0) / num_heads / 2, columns = rows.numel() / rows.size(0);
  return rows.reshape({num_heads, 2, half, columns}).transpose(1, 2).reshape(rows.sizes());
}

at::Tensor from_neighbour_order(const at::Tensor& rows, int64_t num_heads) {
  const int64_t half = rows.size(0) / num_heads / 2, columns = rows.numel() / rows.size(0);
  return rows.reshape({num_heads, half, 2, columns}).transpose(1, 2).reshape(rows.sizes());
}

}  // namespace caldera
