// Rotary position embedding's frequencies, from a decoder's config.json.
#pragma once

#include "base/aten.h"
#include "base/json.h"

namespace caldera {

struct Rope {
  Json parameters;      // transformers 5's "rope_parameters": rope_theta, rope_type and what that type takes
  at::Tensor inv_freq;  // [K / 2] float32
  double attention_scaling = 1;  // factor of cos and sin
};

// Reads transformers 5's "rope_parameters" or the older "rope_theta" and "rope_scaling". Types: default,
// linear, llama3, yarn; the numbers of transformers' modeling_rope_utils. Throws CheckpointError for other
// types and for missing parameters.
Rope make_rope(const Json& config, int64_t head_dim, int64_t max_position_embeddings);

}  // namespace caldera
