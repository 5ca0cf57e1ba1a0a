// What a folder's files are held against before and while a model is made of them.
#pragma once
#include <filesystem>
#include <functional>
#include <string>

#include "base/json.h"
#include "model/vision/tower.h"
#include "model/weights/safetensors.h"

namespace caldera {

// Throws CheckpointError naming the method where a config.json says that the weights beside it are quantised.
void refuse_quantized(const Json& config, const std::string& where);

// Throws CheckpointError naming file, tensor, how many of its values are not finite, and the first. Float32,
// float16 and bfloat16 are looked at; other types pass.
void check_finite(const at::Tensor& values, const std::string& where, const std::string& name);

// A configuration may say that the head is the embedding although the file holds another one. Like
// transformers, this keeps the file's: then it sets text["tie_word_embeddings"] to false, and says so in the
// log. `source` may name the two as a decoder's file or as any LLaVA's.
void untie_differing_head(Json& text, const TensorSource& source);

// generation_config.json may list several tokens that end an answer where config.json has one: the list
// becomes text["eos_token_id"], which exports keep. Throws CheckpointError for a list of anything but ids.
void keep_end_tokens(Json& text, const std::filesystem::path& folder);

// The tower's `tensors` that a source has to give. It may lack what the features do not need, wholly: blocks
// behind the feature layer (LLaVA-NeXT's code saves SigLIP without its last), the last norm, SigLIP's head.
// With `fill` those become zero, norms one, so that such a block changes nothing; without, they stay as they
// are.
NamedTensors needed_of_tower(const NamedTensors& tensors, const VisionTower& tower,
                             const VisionFeatures& features, const TensorSource& source,
                             const std::function<std::string(const std::string&)>& name_in_source, bool fill);

}  // namespace caldera
