// The vision transformer that CLIP and SigLIP share: patches through a convolution, learned positions,
// pre-norm blocks with biases. Legend: I images, P patches, N tokens (P, or P + 1 with a class token), D
// width, F width of the MLP, H heads, K = D / H, T tokens of all images.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/aten.h"
#include "base/json.h"
#include "base/words.h"
#include "model/module.h"
#include "model/vision/tower.h"

namespace caldera {

struct VitConfig {
  int64_t hidden_size = 768, intermediate_size = 3072, num_hidden_layers = 12, num_attention_heads = 12;
  int64_t image_size = 224, patch_size = 32;
  double layer_norm_eps = 1e-5;
  std::string hidden_act = "quick_gelu";  // or "gelu" (exact), "gelu_pytorch_tanh"

  int64_t grid() const { return image_size / patch_size; }  // patches along an edge
  int64_t num_patches() const { return grid() * grid(); }
};

// Reads those keys of an HF vision configuration over the defaults given. `where` names the file in errors.
VitConfig parse_vit_config(const Json& config, const char* where, VitConfig defaults);
// They as an HF vision configuration holds them.
Json to_json(const VitConfig& config);

// How many blocks give hidden_states[vision_feature_layer]; throws ConfigError where there is no such state.
int64_t num_blocks_before(int64_t vision_feature_layer, int64_t num_hidden_layers);

// uint8 pixels [I, 3, Y, X] -> [I, P, D]: normalised, then the convolution with weight [D, 3, patch, patch]
// and bias [D] (or an undefined one), which with stride = kernel is one product.
at::Tensor embed_patches(const at::Tensor& pixels_ICYX, const ImageSpec& spec, const at::Tensor& weight,
                         const at::Tensor& bias);

// Position embeddings [num_other + from * from, D] for a grid of to * to patches: HF's
// interpolate_pos_encoding (bicubic, corners not aligned). The first `num_other` rows, of tokens that are no
// patches, stay.
at::Tensor resize_positions(const at::Tensor& positions_ND, int64_t num_other, int64_t to);

// Fills [num_other + side * side, D] with the sines and cosines of row and column that MAE (arXiv 2111.06377) and MoCo v3 begin
// with; the first `num_other` rows become zero. HF's own start, noise of 0.02, is a thirtieth of what a patch brings: a tower
// trained from it for minutes, not weeks, sees what is there and forgets where.
void fill_sincos_positions_(const at::Tensor& positions_ND, int64_t num_other);

class VitBlocks {
 public:
  explicit VitBlocks(const VitConfig& config);
  // The first `num_blocks` of them: [I, N, D] -> [I, N, D].
  at::Tensor forward(at::Tensor x_IND, int64_t num_blocks) const;
  // "PREFIX.0.self_attn.q_proj.weight", ...
  NamedTensors tensors(const std::string& prefix);

 private:
  struct Block {
    at::Tensor norm1_weight, norm1_bias, norm2_weight, norm2_bias;  // [D]
    at::Tensor qkv_weight, qkv_bias;                                // [3D, D], [3D]
    at::Tensor out_weight, out_bias;                                // [D, D], [D]
    at::Tensor fc1_weight, fc1_bias;                                // [F, D], [F]
    at::Tensor fc2_weight, fc2_bias;                                // [D, F], [D]
  };
  at::Tensor run(const Block& block, const at::Tensor& x_IND) const;

  VitConfig config_;
  std::vector<Block> blocks_;
};

}  // namespace caldera
