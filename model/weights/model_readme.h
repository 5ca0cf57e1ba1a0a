// The README.md of an exported model: what it is, how it is used, what it was trained on and how.
#pragma once
#include <filesystem>
#include <string>

#include "model/weights/load.h"

namespace caldera {

// How another program is to be used with the folder: Markdown, and the "library_name" of Hugging Face's model
// cards ("" for none).
struct ModelUsage {
  std::string library_name, text;
};
ModelUsage hf_usage(bool fits_transformers);
ModelUsage llava_usage(const std::string& mm_vision_tower);
ModelUsage gguf_usage(const std::string& model_file, const std::string& mmproj_file);

// Writes README.md; what the card's provenance does not tell is said to be not recorded.
void write_model_readme(LlavaModel& model, const ModelCard& card, const ModelUsage& usage,
                        const std::filesystem::path& folder);

}  // namespace caldera
