// A decoder's weights in a GGUF file, presented as HF would name and lay them out.
#pragma once
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "base/gguf.h"
#include "base/json.h"
#include "model/weights/safetensors.h"

namespace caldera {

struct GgufDecoder {
  std::string architecture;  // GGUF's general.architecture
  Json config;               // HF's config.json, from the metadata
  std::unique_ptr<TensorSource>
      weights;  // HF's names; F32, F16 and BF16 as they are, quantised types as float32
};

// Reads architectures "llama" (LLaMA, Mistral, SmolLM2, ...), "qwen2" and "qwen3" (see gguf_names.h) with
// tensors of type F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K. llama.cpp stores the rows
// of q and k in the order of its own rotary embedding; they are put back into HF's. Throws CheckpointError
// with file, key or tensor, expected and got.
GgufDecoder open_gguf_decoder(const std::filesystem::path& file);

// A file's tensors under the names that `hf_name` gives them. It returns "" for those that have no place: the
// first such throws CheckpointError.
std::unique_ptr<TensorSource> open_gguf_tensors(std::shared_ptr<GgufFile> file,
                                                const std::function<std::string(const std::string&)>& hf_name);

// One tensor's elements; quantised types become float32.
at::Tensor dequantize(const GgufTensor& tensor, const std::string& where);

}  // namespace caldera
