#include "model/vision/vit.h"

#include <cmath>

#include "base/error.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"
#include "model/taps.h"
#include "model/vision/towers.h"
#include "model/weights/json_fields.h"

namespace caldera {
namespace {

at::Tensor gelu(at::Tensor x, const char* approximate) {
  return x.requires_grad() ? at::gelu(x, approximate) : at::gelu_(x, approximate);
}

at::Tensor activate(at::Tensor x, const std::string& hidden_act) {
  if (hidden_act == "quick_gelu") return quick_gelu(std::move(x));
  return gelu(std::move(x), hidden_act == "gelu" ? "none" : "tanh");
}

at::Tensor add_residual(at::Tensor x, const at::Tensor& residual) {
  return residual.requires_grad() || x.requires_grad() ? residual + x : x.add_(residual);
}

// uint8 [I, 3, Y, X] -> normalised patches [I, P, 3 * patch * patch] in the dtype and on the device of `like`.
at::Tensor normalized_patches(const at::Tensor& pixels_ICYX, const ImageSpec& spec, int64_t patch,
                              const at::Tensor& like) {
  const int64_t num_images = pixels_ICYX.size(0), grid = pixels_ICYX.size(2) / patch;
  if (!has_cuda_kernel(like))
    return normalize_pixels(pixels_ICYX, spec, like.scalar_type())
        .narrow(2, 0, grid * patch)
        .narrow(3, 0, grid * patch)
        .reshape({num_images, 3, grid, patch, grid, patch})
        .permute({0, 2, 4, 1, 3, 5})
        .reshape({num_images, grid * grid, 3 * patch * patch});
  const at::Tensor pixels = pixels_ICYX.contiguous();
  at::Tensor patches_IPV = at::empty({num_images, grid * grid, 3 * patch * patch}, like.options());
  const PixelScale by = pixel_scale(spec);
  cuda::with_type(like, [&]<class T>(T*, cuda::Stream stream) {
    cuda::normalized_patches(pixels.const_data_ptr<uint8_t>(), cuda::out<T>(patches_IPV), num_images,
                             pixels.size(2), patch, by.scale, by.shift, stream);
  });
  return patches_IPV;
}

}  // namespace

VitConfig parse_vit_config(const Json& json, const char* where, VitConfig c) {
  c.hidden_size = integer_field(json, where, "hidden_size", c.hidden_size, 1, 1 << 16);
  c.intermediate_size = integer_field(json, where, "intermediate_size", c.intermediate_size, 1, 1 << 18);
  c.num_hidden_layers = integer_field(json, where, "num_hidden_layers", c.num_hidden_layers, 1, 1 << 10);
  c.num_attention_heads =
      integer_field(json, where, "num_attention_heads", c.num_attention_heads, 1, 1 << 10);
  c.image_size = integer_field(json, where, "image_size", c.image_size, 1, 1 << 13);
  c.patch_size = integer_field(json, where, "patch_size", c.patch_size, 1, c.image_size);
  c.layer_norm_eps = number_field(json, where, "layer_norm_eps", c.layer_norm_eps);
  c.hidden_act = text_field(json, where, "hidden_act", c.hidden_act);
  CALDERA_CHECK(integer_field(json, where, "num_channels", 3, 1, 16) == 3, CheckpointError,
                "{}: num_channels: only 3 (RGB) is supported", where);
  CALDERA_CHECK(c.hidden_act == "quick_gelu" || c.hidden_act == "gelu" || c.hidden_act == "gelu_pytorch_tanh",
                CheckpointError, "{}: hidden_act: expected quick_gelu, gelu or gelu_pytorch_tanh, got {}",
                where, c.hidden_act);
  CALDERA_CHECK(c.hidden_size % c.num_attention_heads == 0, CheckpointError,
                "{}: hidden_size {} is no multiple of num_attention_heads {}", where, c.hidden_size,
                c.num_attention_heads);
  return c;
}

Json to_json(const VitConfig& config) {
  return {{"hidden_size", config.hidden_size},
          {"intermediate_size", config.intermediate_size},
          {"num_hidden_layers", config.num_hidden_layers},
          {"num_attention_heads", config.num_attention_heads},
          {"num_channels", 3},
          {"image_size", config.image_size},
          {"patch_size", config.patch_size},
          {"hidden_act", config.hidden_act},
          {"layer_norm_eps", config.layer_norm_eps},
          {"attention_dropout", 0.0}};
}

int64_t num_blocks_before(int64_t layer, int64_t layers) {
  CALDERA_CHECK(layer >= -(layers + 1) && layer <= layers, ConfigError,
                "vision_feature_layer: the tower has hidden states {} to {}, got {}", -(layers + 1), layers,
                layer);
  return layer < 0 ? layers + 1 + layer : layer;
}

at::Tensor embed_patches(const at::Tensor& pixels_ICYX, const ImageSpec& spec, const at::Tensor& weight,
                         const at::Tensor& bias) {
  const int64_t D = weight.size(0), patch = weight.size(2);
  const at::Tensor patches_IPV = normalized_patches(pixels_ICYX, spec, patch, weight);
  return affine(patches_IPV, weight.reshape({D, 3 * patch * patch}), bias);
}

at::Tensor resize_positions(const at::Tensor& positions_ND, int64_t num_other, int64_t to) {
  const at::NoGradGuard no_grad;
  const int64_t D = positions_ND.size(1), num_patches = positions_ND.size(0) - num_other;
  const auto from = static_cast<int64_t>(std::lround(std::sqrt(static_cast<double>(num_patches))));
  CALDERA_ASSERT(from * from == num_patches);
  if (from == to) return positions_ND;
  const at::Tensor grid_1DYX =
      positions_ND.narrow(0, num_other, num_patches).to(at::kFloat).view({1, from, from, D});
  const at::Tensor resized_1DYX =
      at::upsample_bicubic2d(grid_1DYX.permute({0, 3, 1, 2}), {to, to}, /*align_corners=*/false);
  const at::Tensor patches_PD = resized_1DYX.permute({0, 2, 3, 1}).reshape({to * to, D});
  return at::cat({positions_ND.narrow(0, 0, num_other), patches_PD.to(positions_ND.scalar_type())});
}

void fill_sincos_positions_(const at::Tensor& positions_ND, int64_t num_other) {
  const int64_t D = positions_ND.size(1), quarter = D / 4;
  const auto side = static_cast<int64_t>(std::lround(std::sqrt(positions_ND.size(0) - num_other)));
  const at::Tensor where_S = at::arange(side, at::kDouble);
  const at::Tensor frequency_F =
      at::pow(10000.0, at::arange(quarter, at::kDouble) / -static_cast<double>(std::max<int64_t>(quarter, 1)));
  const at::Tensor angle_SF = at::outer(where_S, frequency_F);
  const at::Tensor axis_SH = at::cat({angle_SF.sin(), angle_SF.cos()}, 1);
  const auto over_grid = [&](int64_t axis) {
    return axis_SH.unsqueeze(axis).expand({side, side, 2 * quarter}).reshape({side * side, 2 * quarter});
  };
  at::NoGradGuard no_grad;
  positions_ND.zero_();
  positions_ND.slice(0, num_other).slice(1, 0, 4 * quarter).copy_(at::cat({over_grid(0), over_grid(1)}, 1));
}

VitBlocks::VitBlocks(const VitConfig& config)
    : config_(config), blocks_(static_cast<size_t>(config.num_hidden_layers)) {
  const int64_t D = config.hidden_size, F = config.intermediate_size;
  for (Block& block : blocks_) {
    for (at::Tensor* norm : {&block.norm1_weight, &block.norm1_bias, &block.norm2_weight, &block.norm2_bias})
      *norm = at::empty({D});
    block.qkv_weight = at::empty({3 * D, D});
    block.qkv_bias = at::empty({3 * D});
    block.out_weight = at::empty({D, D});
    block.out_bias = at::empty({D});
    block.fc1_weight = at::empty({F, D});
    block.fc1_bias = at::empty({F});
    block.fc2_weight = at::empty({D, F});
    block.fc2_bias = at::empty({D});
  }
}

at::Tensor VitBlocks::forward(at::Tensor x_IND, int64_t num_blocks) const {
  tap("vision_tower.embeddings", x_IND);
  for (size_t i = 0; i < static_cast<size_t>(num_blocks); ++i) {
    x_IND = run(blocks_[i], x_IND);
    tap("vision_tower.layers", i, x_IND);
  }
  return x_IND;
}

NamedTensors VitBlocks::tensors(const std::string& prefix) {
  const int64_t D = config_.hidden_size;
  NamedTensors list;
  const auto add = [&list](const std::string& name, at::Tensor& weight, at::Tensor& bias) {
    list.push_back({name + ".weight", &weight});
    list.push_back({name + ".bias", &bias});
  };
  for (size_t i = 0; i < blocks_.size(); ++i) {
    Block& block = blocks_[i];
    const std::string root = fmt::format("{}.{}.", prefix, i);
    const char* parts[] = {"q_proj", "k_proj", "v_proj"};
    for (int64_t part = 0; part < 3; ++part) {
      const std::string name = root + "self_attn." + parts[part];
      list.push_back({name + ".weight", &block.qkv_weight, part * D, D});
      list.push_back({name + ".bias", &block.qkv_bias, part * D, D});
    }
    add(root + "self_attn.out_proj", block.out_weight, block.out_bias);
    add(root + "layer_norm1", block.norm1_weight, block.norm1_bias);
    add(root + "mlp.fc1", block.fc1_weight, block.fc1_bias);
    add(root + "mlp.fc2", block.fc2_weight, block.fc2_bias);
    add(root + "layer_norm2", block.norm2_weight, block.norm2_bias);
  }
  return list;
}

at::Tensor VitBlocks::run(const Block& block, const at::Tensor& x_IND) const {
  const int64_t num_images = x_IND.size(0), N = x_IND.size(1), D = x_IND.size(2);
  const int64_t H = config_.num_attention_heads, K = D / H;
  const auto norm = [&](const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
    return at::layer_norm(x, {D}, weight, bias, config_.layer_norm_eps);
  };
  at::Tensor h_IND = norm(x_IND, block.norm1_weight, block.norm1_bias);
  const std::vector<at::Tensor> qkv_THK =
      affine(h_IND, block.qkv_weight, block.qkv_bias).view({num_images * N, 3, H, K}).unbind(1);
  std::vector<int64_t> cu_seqlens;
  for (int64_t i = 0; i <= num_images; ++i) cu_seqlens.push_back(i * N);
  const at::Tensor attended_THK =
      packed_attention(qkv_THK[0], qkv_THK[1], qkv_THK[2], cu_seqlens, /*causal=*/false);
  h_IND = affine(attended_THK.reshape({num_images, N, D}), block.out_weight, block.out_bias);
  const at::Tensor middle_IND = add_residual(h_IND, x_IND);

  at::Tensor h_INF =
      affine(norm(middle_IND, block.norm2_weight, block.norm2_bias), block.fc1_weight, block.fc1_bias);
  h_INF = activate(std::move(h_INF), config_.hidden_act);
  return add_residual(affine(h_INF, block.fc2_weight, block.fc2_bias), middle_IND);
}

}  // namespace caldera
