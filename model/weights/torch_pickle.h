// Dictionaries of tensors as torch.save writes them: pytorch_model.bin, mm_projector.bin,
// non_lora_trainables.bin, adapter_model.bin.
#pragma once
#include <filesystem>
#include <memory>

#include "model/weights/safetensors.h"

namespace caldera {

// One file of torch.save's zip format (PyTorch 1.6 and later). A pickle is a program; of its instructions
// this reader knows those that build a dictionary of tensors, and of the names it may call only OrderedDict
// and the ones that rebuild a tensor from a storage. Nothing is ever run. Throws CheckpointError for
// everything else, naming the instruction or the name and its place; for storages of the wrong size, views
// that reach beyond their storage, values that are no tensors; for PyTorch's older format, TorchScript,
// big-endian data.
std::unique_ptr<TensorSource> open_torch_pickle(const std::filesystem::path& file);

}  // namespace caldera
