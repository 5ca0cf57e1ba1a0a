// HF's config.json of a decoder from a GGUF file's metadata.
#pragma once
#include "base/gguf.h"
#include "base/json.h"
#include "model/weights/gguf_names.h"

namespace caldera {

// llama.cpp's tensor of one divisor a rotary frequency, for "llama3" rope scaling.
inline constexpr const char* kGgufRopeDivisors = "rope_freqs.weight";

// What the metadata claim is held against the tensors' shapes before anything is allocated by it. Throws
// CheckpointError with file, key or tensor, expected and got.
Json gguf_decoder_config(const GgufFile& file, const GgufArchitecture& architecture);

}  // namespace caldera
