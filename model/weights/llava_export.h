// The original LLaVA's layout (haotian-liu/LLaVA): LlavaLlamaForCausalLM folders, and what its stage 1 leaves
// behind.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>

#include "model/weights/load.h"

namespace caldera {

struct LlavaExportOptions {
  at::ScalarType dtype = at::kFloat;
  std::string mm_vision_tower;  // config.json's: a folder, or a name on HF's hub that begins with "openai"
  int64_t model_max_length = 2048;
  int64_t bos_token_id = 1, eos_token_id = 2, pad_token_id = 0;
  int64_t max_shard_bytes = 5'000'000'000;
  TensorValues values;  // where they are not the model's own
};

// Throws ConfigError saying why where LLaVA's code has no such model: towers other than CLIP, decoders other
// than LLaMA and Mistral.
void check_original_llava(const LlavaModel& model);

// config.json, the weights of all parts as safetensors under LLaVA's names, generation_config.json and
// caldera.json, into an existing folder; the tokenizer (without <image>, which LLaVA cuts texts at) is the
// caller's. The vocabulary is not padded.
void save_original_llava(LlavaModel& model, const ModelCard& card, const LlavaExportOptions& options,
                         const std::filesystem::path& folder);
// mm_projector.bin and config.json: what --pretrain_mm_mlp_adapter takes.
void save_original_projector(LlavaModel& model, const ModelCard& card, const LlavaExportOptions& options,
                             const std::filesystem::path& folder);

}  // namespace caldera
