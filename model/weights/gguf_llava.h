// A whole LLaVA as llama.cpp has it: a folder with a decoder's GGUF file and, beside it, an "mmproj" file
// with the tower and the projector.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>

#include "model/weights/load.h"

namespace caldera {

struct GgufLlavaFiles {
  std::filesystem::path decoder, mmproj;
};

// The two files of a folder that has no config.json but a file mmproj*.gguf; nothing for other folders.
// Throws CheckpointError where there are several decoders or mmproj files, or no decoder.
std::optional<GgufLlavaFiles> find_gguf_llava(const std::filesystem::path& folder);

// The whole model, float32 on CPU. What llama.cpp leaves out, the tower's last norm, is the identity. Towers
// with a class token are CLIP's, others SigLIP's; the projector is "mlp2x_gelu". Throws CheckpointError with
// file, key or tensor, expected and got.
std::unique_ptr<LlavaModel> load_gguf_llava(const GgufLlavaFiles& files);
// The tower alone, without its weights.
std::unique_ptr<VisionTower> make_gguf_vision_tower(const std::filesystem::path& mmproj);

// What an export of ours left in the decoder's file; else how llama.cpp takes pictures (padded), no template.
ModelCard read_gguf_card(const GgufLlavaFiles& files);

}  // namespace caldera
