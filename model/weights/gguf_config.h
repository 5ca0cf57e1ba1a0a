// HF's config.json of a decoder from a GGUF file's metadata.
#pragma once
#include "base/gguf.h"
#include "base/json.h"
#include "model/weights/gguf_names.h"

namespace caldera {

// llama.cpp's tensor of one divisor a rotary frequency, for "llama3" rope scaling.
inline constexpr const char* kGgufRopeDivisors = "rope_freqs.weight";

// Throws CheckpointError for one part of a model that llama.cpp's gguf-split has cut up.
void refuse_gguf_part(const GgufFile& file);

// What the metadata claim is held against the tensors' shapes before anything is allocated by it. Throws
// CheckpointError with file, key or tensor, expected and got.
Json gguf_decoder_config(const GgufFile& file, const GgufArchitecture& architecture);

}  // namespace caldera
