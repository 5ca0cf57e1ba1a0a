// Writing a dictionary of tensors as torch.save does, for programs that read nothing else (the original
// LLaVA's mm_projector.bin). The reader is torch_pickle.h.
#pragma once
#include <filesystem>
#include <optional>

#include "model/weights/safetensors.h"

namespace caldera {

// Writes {name: tensor} atomically, such that torch.load(file, weights_only=True) and mmap=True read it;
// floats are converted where a dtype is given. Types: float32, float16, bfloat16, int64. Throws Error above 4
// GB (that is what safetensors is for).
void write_torch_pickle(const std::filesystem::path& file, const TensorList& tensors,
                        std::optional<at::ScalarType> dtype = {});

}  // namespace caldera
