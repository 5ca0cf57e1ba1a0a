// Models as llama.cpp loads them: the decoder as one GGUF file, tower and projector as another ("mmproj").
#pragma once
#include <filesystem>
#include <optional>
#include <string>

#include "base/gguf_writer.h"
#include "model/llava.h"
#include "model/weights/tensor_values.h"

namespace caldera {

// The quantised types by llama-quantize's names: q8_0, q4_k_m, q5_k_m, q6_k. Nothing for other names.
std::optional<GgmlType> quantized_ggml_type(const std::string& name);
// The mmproj file's type beside a decoder of `type`: float16 beside the "K" types, as llama.cpp's users keep
// it, else the same.
GgmlType mmproj_ggml_type(GgmlType type);

struct GgufExportOptions {
  // Of the matrices; vectors stay float32, as in llama.cpp's own converter. kQ4_K and kQ5_K stand for
  // llama-quantize's mixtures Q4_K_M and Q5_K_M, kQ6_K for its Q6_K: some matrices get more bits.
  GgmlType type = GgmlType::kF16;
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

// Writes one file each, streamed tensor by tensor. Where rows are no whole blocks, the tensor has the
// type that llama-quantize falls back to (of 32 elements a block instead of 256), else float16; where
// llama.cpp wants another type, float16 or float32. A decoder whose attention slides is limited to the window
// as its context, with a warning: llama.cpp attends to all tokens.
void save_gguf_decoder(LanguageModel& language, const GgufExportOptions& options,
                       const std::filesystem::path& file);
void save_gguf_mmproj(LlavaModel& model, const GgufExportOptions& options, const std::filesystem::path& file);

}  // namespace caldera
