// A model whose weights stay in their files: what an export needs, in memory that does not grow with the
// model.
#pragma once
#include <filesystem>
#include <optional>

#include "model/weights/load.h"
#include "model/weights/tensor_values.h"

namespace caldera {

struct MappedModel {
  LoadedModel loaded;   // structure and configuration; the weights' memory is not set and must not be read
  TensorValues values;  // each tensor in its file's dtype; keeps the files open
};

// For Hugging Face folders of a whole model, with the checks of load_llava: throws CheckpointError for
// missing, mis-shaped and left-over tensors. Nothing for folders whose weights come from several places
// (steps' checkpoints, adapters, the original LLaVA's): those must be loaded.
std::optional<MappedModel> map_llava(const std::filesystem::path& dir);

}  // namespace caldera
