// Models as llama.cpp loads them: the decoder as one GGUF file, tower and projector as another ("mmproj").
#pragma once
#include <filesystem>

#include "base/gguf_writer.h"
#include "model/llava.h"
#include "model/weights/tensor_values.h"

namespace caldera {

struct GgufExportOptions {
  GgmlType type = GgmlType::kF16;  // of the matrices; vectors stay float32, as in llama.cpp's own converter
  GgufFields general;              // further "general.*" fields and provenance, into both files
  GgufFields tokenizer;            // "tokenizer.*", into the decoder's file
  std::string image_aspect_ratio;  // how pictures became square in training (words.h)
  TensorValues values;             // where they are not the model's own
};

// Throws ConfigError saying why where llama.cpp cannot represent the decoder (its family, its rotary
// embedding).
void check_gguf_decoder(const LanguageModel& language);
// The same for tower and projector: its LLaVA graph knows CLIP and SigLIP towers, without the class token's
// feature, and projectors of two layers.
void check_gguf_mmproj(const LlavaModel& model);

// Writes one file each, streamed tensor by tensor. Where rows are no whole q8_0 blocks, or llama.cpp wants
// another type, the tensor is float16 or float32 instead. A decoder whose attention slides is limited to the
// window as its context, with a warning: llama.cpp attends to all tokens.
void save_gguf_decoder(LanguageModel& language, const GgufExportOptions& options,
                       const std::filesystem::path& file);
void save_gguf_mmproj(LlavaModel& model, const GgufExportOptions& options, const std::filesystem::path& file);

}  // namespace caldera
