// llama.cpp's names for architectures and tensors, beside HF's: used by the reader and the writer alike.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "base/aten.h"

namespace caldera {

struct GgufArchitecture {
  const char* name;                      // general.architecture, and the prefix of its keys
  std::vector<const char*> model_types;  // HF's; files of this architecture are read as the first
  // llama.cpp rotates neighbouring rows of q and k for it, HF the two halves of a head: the rows are in
  // another order.
  bool rotates_neighbours;
};
std::span<const GgufArchitecture> gguf_architectures();

// "model.layers.3.self_attn.q_proj.weight" <-> "blk.3.attn_q.weight"; "" where the other side has no such
// tensor.
std::string gguf_decoder_name(const std::string& hf_name);
std::string hf_decoder_name(const std::string& gguf_name);
// "vision_model.encoder.layers.3.mlp.fc1.bias" <-> "v.blk.3.ffn_up.bias"; "" where llama.cpp's LLaVA graph has
// no such tensor.
std::string gguf_tower_name(const std::string& hf_name);
std::string hf_tower_name(const std::string& gguf_name);
// The projector "mlp2x_gelu": "linear_1.weight" <-> "mm.0.weight"; "" for other names.
std::string gguf_projector_name(const std::string& name);
std::string hf_projector_name(const std::string& gguf_name);

// Rows of q or k (weights [H K, D] or biases [H K]) from HF's order into llama.cpp's, and back.
at::Tensor to_neighbour_order(const at::Tensor& rows, int64_t num_heads);
at::Tensor from_neighbour_order(const at::Tensor& rows, int64_t num_heads);

}  // namespace caldera
