// What a model's folder or file holds, told without loading it: kind, parts, sizes, dtypes, what is missing
// or left over.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/json.h"

namespace caldera {

struct TensorReport {
  std::string name, dtype;
  std::vector<int64_t> shape;
  int64_t num_bytes = 0;
};

struct PartReport {
  std::string name;  // "vision_tower", "projector", "language_model", or what the file calls itself
  std::string what;  // "clip: 24 blocks, width 1024, ..."
  std::vector<TensorReport> tensors;
};

struct ModelReport {
  std::filesystem::path path;  // what was looked at: for a run's folder, the model in it
  std::string kind;            // "Hugging Face LLaVA", "step checkpoint", ...
  std::vector<std::pair<std::string, std::string>> facts;  // in the order in which they are best read
  std::vector<PartReport> parts;
  std::vector<std::string>
      missing;  // tensors that the configuration asks for, or that have other shapes; files that are needed
  std::vector<std::string> leftover;  // tensors that nothing asks for
  Json provenance;                    // caldera.json's; null where there is none
};

// A folder that --model takes (a run's, a step's checkpoint, Hugging Face's or the original LLaVA's, an
// adapter's), one of a single part (CLIP, a decoder), the original LLaVA's stage 1 (mm_projector.bin), an
// export for llama.cpp, or a single file: .gguf, .safetensors, .bin. Throws CheckpointError for what is none
// of these or cannot be read.
ModelReport inspect_model(const std::filesystem::path& path);

Json to_json(const ModelReport& report);

}  // namespace caldera
