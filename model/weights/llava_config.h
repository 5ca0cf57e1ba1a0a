// What the config.json of a whole LLaVA's folder says. There are two kinds: HF's
// (LlavaForConditionalGeneration, with text_config and vision_config), and the original LLaVA's
// (LlavaLlamaForCausalLM and its like: a decoder's keys with "mm_..." beside them, and a tower that is named,
// not held).
#pragma once
#include <filesystem>

#include "base/json.h"
#include "model/weights/load.h"

namespace caldera {

bool is_hf_llava(const Json& config);
bool is_original_llava(const Json& config);

// The decoder's part of an HF LLaVA's: its text_config, tied where the whole says so, with the sizes of transformers' class
// where it has none: transformers 4 wrote of it what differs from the class alone (llava-hf/llava-1.5-7b-hf names no width).
Json hf_text_config(const Json& config, const std::string& where);

// vision_feature_layer and vision_feature_select_strategy; throws CheckpointError for what is not supported.
VisionFeatures hf_vision_features(const Json& config, const std::string& where);

// The model that an HF folder's config.json describes; the weights' memory is not set. `vocab_size` > 0: the
// rows of the vocabulary without an export's padding. `source`: the folder's weights, which say whether the
// head is the embedding.
std::unique_ptr<LlavaModel> make_hf_llava(const std::filesystem::path& folder, int64_t vocab_size,
                                          const TensorSource& source);

// What the original LLaVA's says.
struct OriginalLlava {
  Json text;                           // the decoder's own configuration
  std::string vision_tower;            // as it stands: a folder, or a name on HF's hub
  std::filesystem::path tower_folder;  // where it is here; empty where it is not
  VisionFeatures features;
  std::string mm_projector_type;
  std::string image_aspect_ratio;
};
// A named tower is looked for as a folder (beside the model, then as it stands), then in HF's cache
// (HF_HUB_CACHE, HF_HOME or ~/.cache/huggingface). Throws CheckpointError for what this program does not do:
// other decoders, <im_start> tokens around pictures, several tiles a picture.
OriginalLlava read_original_llava(const std::filesystem::path& folder, const Json& config);

// The whole model. Tower weights that the folder holds ("model.vision_tower...") win over those of the named
// tower. Throws CheckpointError where the tower is not found.
std::unique_ptr<LlavaModel> load_original_llava(const std::filesystem::path& folder, const Json& config,
                                                int64_t vocab_size);
// What its stage 1 leaves: a folder with mm_projector.bin and no other weights, whose decoder is
// `model_base`.
bool is_stage_1(const std::filesystem::path& folder, const Json& config);
LoadedModel load_stage_1(const std::filesystem::path& folder, const Json& config,
                         const std::filesystem::path& model_base);

}  // namespace caldera
