// The names under which LLaVA's tensors are found in files of different ages.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "model/weights/safetensors.h"

namespace caldera {

// The name in `source` of a tensor with the given classic name (transformers 4.x:
// "language_model.model.layers...", "vision_tower.vision_model...", "multi_modal_projector.linear_1..."):
// that name itself, or transformers 5.x's ("model.language_model...", "lm_head.weight", "model.vision_tower..."
// and, as it saves a fresh model, "vision_tower.embeddings..."), or the original LLaVA's ("model.layers...",
// "model.mm_projector.0...", "model.vision_tower.vision_tower..."). The classic name where the source has none.
std::string find_llava_name(const std::string& classic, const TensorSource& source);

// What nobody wanted of a source is refused (CheckpointError), but for the harmless and for the buffers
// (position_ids, inv_freq) that older releases of transformers saved along.
void refuse_leftovers(const std::vector<std::string>& leftovers, const TensorSource& source,
                      const std::function<bool(const std::string&)>& is_harmless);

}  // namespace caldera
