// A model folder opened for use: weights, tokenizer, template and picture settings in one struct. Scoring,
// generation and serving all begin here.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "base/words.h"
#include "data/dataset.h"
#include "model/weights/load.h"

namespace caldera {

struct SessionOptions {
  std::filesystem::path model;       // see resolve_model_folder()
  std::filesystem::path model_base;  // of an adapter's folder; "": the one that the folder names
  std::string
      conversation_template;    // "": the folder's own, else what the tokenizer's chat template amounts to
  std::string dtype = "auto";   // float32, bfloat16, int8 (the decoder's weights; for generation); auto:
                                // float32 on the CPU, bfloat16 on CUDA
  std::string device = "auto";  // cpu, cuda; auto: CUDA where there is one
};

struct ModelSession {
  std::unique_ptr<LlavaModel> model;
  ModelCard card;
  std::filesystem::path folder;
  SampleFormat format;  // model_max_length is what the decoder's positions allow
};

// Throws CheckpointError for a folder that is no model, ConfigError for an unknown template, dtype or device.
ModelSession open_model(const SessionOptions& options);

// The same without the weights: what tokenising needs. `folder` may also be a plain tokenizer folder.
struct TextSession {
  ModelCard card;
  SampleFormat format;                  // image_spec is the default where the folder names no tower
  std::optional<ImageSpec> image_spec;  // absent where the folder names no tower
};
TextSession open_text(const std::filesystem::path& folder, const std::string& conversation_template);

// Where the tokenizer of a resolved model folder lies: in it, or (a step's checkpoint) at the base model it
// names.
std::filesystem::path tokenizer_path(const std::filesystem::path& folder);

}  // namespace caldera
