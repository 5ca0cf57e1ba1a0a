// CLIP's vision transformer (arXiv 2103.00020), as HF's CLIPVisionModel computes it.
// Legend: I images, P patches, N = P + 1 tokens (CLS first), D width, F width of the MLP, H heads, K = D / H.
#include <ATen/ATen.h>

#include <cmath>

#include "base/error.h"
#include "model/vision/towers.h"
#include "model/weights/json_fields.h"

namespace caldera {
namespace {

constexpr const char* kWhere = "the CLIP tower's config.json";

struct ClipConfig {
  int64_t hidden_size = 768, intermediate_size = 3072, num_hidden_layers = 12, num_attention_heads = 12;
  int64_t image_size = 224, patch_size = 32, projection_dim = 512;
  double layer_norm_eps = 1e-5, initializer_range = 0.02, initializer_factor = 1.0;
  std::string hidden_act = "quick_gelu";

  int64_t num_patches() const { return (image_size / patch_size) * (image_size / patch_size); }
};

ClipConfig parse_config(const Json& json) {
  ClipConfig c;
  c.hidden_size = integer_field(json, kWhere, "hidden_size", c.hidden_size, 1, 1 << 16);
  c.intermediate_size = integer_field(json, kWhere, "intermediate_size", c.intermediate_size, 1, 1 << 18);
  c.num_hidden_layers = integer_field(json, kWhere, "num_hidden_layers", c.num_hidden_layers, 1, 1 << 10);
  c.num_attention_heads =
      integer_field(json, kWhere, "num_attention_heads", c.num_attention_heads, 1, 1 << 10);
  c.image_size = integer_field(json, kWhere, "image_size", c.image_size, 1, 1 << 13);
  c.patch_size = integer_field(json, kWhere, "patch_size", c.patch_size, 1, c.image_size);
  c.projection_dim = integer_field(json, kWhere, "projection_dim", c.projection_dim, 1, 1 << 16);
  c.layer_norm_eps = number_field(json, kWhere, "layer_norm_eps", c.layer_norm_eps);
  c.initializer_range = number_field(json, kWhere, "initializer_range", c.initializer_range);
  c.initializer_factor = number_field(json, kWhere, "initializer_factor", c.initializer_factor);
  c.hidden_act = text_field(json, kWhere, "hidden_act", c.hidden_act);
  CALDERA_CHECK(integer_field(json, kWhere, "num_channels", 3, 1, 16) == 3, CheckpointError,
                "{}: num_channels: only 3 (RGB) is supported", kWhere);
  CALDERA_CHECK(c.hidden_act == "quick_gelu" || c.hidden_act == "gelu", CheckpointError,
                "{}: hidden_act: expected quick_gelu or gelu, got {}", kWhere, c.hidden_act);
  CALDERA_CHECK(c.hidden_size % c.num_attention_heads == 0, CheckpointError,
                "{}: hidden_size {} is no multiple of num_attention_heads {}", kWhere, c.hidden_size,
                c.num_attention_heads);
  return c;
}

struct ClipBlock {
  at::Tensor norm1_weight, norm1_bias, norm2_weight, norm2_bias;  // [D]
  at::Tensor qkv_weight, qkv_bias;                                // [3D, D], [3D]
  at::Tensor out_weight, out_bias;                                // [D, D], [D]
  at::Tensor fc1_weight, fc1_bias;                                // [F, D], [F]
  at::Tensor fc2_weight, fc2_bias;                                // [D, F], [D]
};

// x * sigmoid(1.702 x). Without a graph x itself takes the result.
at::Tensor quick_gelu(at::Tensor x) {
  return x.requires_grad() ? x * at::sigmoid(x * 1.702) : x.mul_((x * 1.702).sigmoid_());
}

at::Tensor exact_gelu(at::Tensor x) { return x.requires_grad() ? at::gelu(x) : at::gelu_(x); }

at::Tensor add_residual(at::Tensor x, const at::Tensor& residual) {
  return residual.requires_grad() || x.requires_grad() ? residual + x : x.add_(residual);
}

class ClipTower : public VisionTower {
 public:
  ClipTower(const Json& config, const Json& preprocessor, const VisionFeatures& features)
      : config_(parse_config(config)), spec_(image_spec_from(preprocessor, config_.image_size)) {
    const int64_t layers = config_.num_hidden_layers, layer = features.vision_feature_layer;
    CALDERA_CHECK(layer >= -(layers + 1) && layer <= layers, ConfigError,
                  "vision_feature_layer: the tower has hidden states {} to {}, got {}", -(layers + 1), layers,
                  layer);
    num_blocks_run_ = layer < 0 ? layers + 1 + layer : layer;
    drop_class_token_ = drops_class_token(features);
    spec_.num_image_tokens = config_.num_patches() + (drop_class_token_ ? 0 : 1);

    const int64_t D = config_.hidden_size, F = config_.intermediate_size, patch = config_.patch_size;
    class_embedding_ = at::empty({D});
    patch_embedding_ = at::empty({D, 3, patch, patch});
    position_embedding_ = at::empty({config_.num_patches() + 1, D});
    for (at::Tensor* norm : {&pre_norm_weight_, &pre_norm_bias_, &post_norm_weight_, &post_norm_bias_})
      *norm = at::empty({D});
    blocks_.resize(static_cast<size_t>(layers));
    for (ClipBlock& block : blocks_) {
      for (at::Tensor* norm :
           {&block.norm1_weight, &block.norm1_bias, &block.norm2_weight, &block.norm2_bias})
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

  at::Tensor forward(const at::Tensor& pixels_ICYX) override {
    check_pixels(pixels_ICYX, spec_);
    at::Tensor x_IND = embed(pixels_ICYX);
    for (int64_t i = 0; i < num_blocks_run_; ++i) x_IND = run_block(blocks_[static_cast<size_t>(i)], x_IND);
    return drop_class_token_ ? x_IND.narrow(1, 1, config_.num_patches()) : x_IND;
  }

  NamedTensors tensors() override {
    const int64_t D = config_.hidden_size;
    const std::string root = "vision_model.";
    NamedTensors list;
    const auto add = [&list](std::string name, at::Tensor& owner) {
      list.push_back({std::move(name), &owner});
    };
    const auto add_pair = [&](const std::string& name, at::Tensor& weight, at::Tensor& bias) {
      add(name + ".weight", weight);
      add(name + ".bias", bias);
    };
    add(root + "embeddings.class_embedding", class_embedding_);
    add(root + "embeddings.patch_embedding.weight", patch_embedding_);
    add(root + "embeddings.position_embedding.weight", position_embedding_);
    add_pair(root + "pre_layrnorm", pre_norm_weight_, pre_norm_bias_);
    for (size_t i = 0; i < blocks_.size(); ++i) {
      ClipBlock& block = blocks_[i];
      const std::string prefix = fmt::format("{}encoder.layers.{}.", root, i);
      const char* parts[] = {"q_proj", "k_proj", "v_proj"};
      for (int64_t part = 0; part < 3; ++part) {
        const std::string name = prefix + "self_attn." + parts[part];
        list.push_back({name + ".weight", &block.qkv_weight, part * D, D});
        list.push_back({name + ".bias", &block.qkv_bias, part * D, D});
      }
      add_pair(prefix + "self_attn.out_proj", block.out_weight, block.out_bias);
      add_pair(prefix + "layer_norm1", block.norm1_weight, block.norm1_bias);
      add_pair(prefix + "mlp.fc1", block.fc1_weight, block.fc1_bias);
      add_pair(prefix + "mlp.fc2", block.fc2_weight, block.fc2_bias);
      add_pair(prefix + "layer_norm2", block.norm2_weight, block.norm2_bias);
    }
    // Not used by LLaVA, which reads hidden states; listed so that files stay complete.
    add_pair(root + "post_layernorm", post_norm_weight_, post_norm_bias_);
    return list;
  }

  ImageSpec image_spec() const override { return spec_; }
  int64_t hidden_size() const override { return config_.hidden_size; }
  const char* id() const override { return "clip"; }

  Json config() const override {
    return {{"architectures", {"CLIPVisionModel"}},
            {"model_type", "clip_vision_model"},
            {"hidden_size", config_.hidden_size},
            {"intermediate_size", config_.intermediate_size},
            {"num_hidden_layers", config_.num_hidden_layers},
            {"num_attention_heads", config_.num_attention_heads},
            {"num_channels", 3},
            {"image_size", config_.image_size},
            {"patch_size", config_.patch_size},
            {"projection_dim", config_.projection_dim},
            {"hidden_act", config_.hidden_act},
            {"layer_norm_eps", config_.layer_norm_eps},
            {"attention_dropout", 0.0},
            {"initializer_range", config_.initializer_range},
            {"initializer_factor", config_.initializer_factor}};
  }

  // HF's CLIPPreTrainedModel._init_weights.
  void init(uint64_t seed) {
    const double width = static_cast<double>(config_.hidden_size), factor = config_.initializer_factor;
    const double depth = std::pow(2.0 * static_cast<double>(config_.num_hidden_layers), -0.5);
    for (NamedTensor& named : tensors()) {
      at::Tensor value = named.value();
      const auto has = [&named](const char* part) { return named.name.find(part) != std::string::npos; };
      if (has("class_embedding"))
        init_normal_(value, factor * std::pow(width, -0.5), seed, named.name);
      else if (has("_embedding."))
        init_normal_(value, factor * config_.initializer_range, seed, named.name);
      else if (has("norm"))
        value.fill_(has(".weight") ? 1.0 : 0.0);
      else if (has(".bias"))
        value.zero_();
      else if (has("out_proj"))
        init_normal_(value, factor * std::pow(width, -0.5), seed, named.name);
      else if (has("fc1"))
        init_normal_(value, factor * std::pow(2.0 * width, -0.5), seed, named.name);
      else
        init_normal_(value, factor * std::pow(width, -0.5) * depth, seed, named.name);  // q, k, v, fc2
    }
  }

 private:
  at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) const {
    return at::layer_norm(x, {config_.hidden_size}, weight, bias, config_.layer_norm_eps);
  }

  // Patches through the convolution, which with stride = kernel is one product; CLS and positions; the first
  // norm.
  at::Tensor embed(const at::Tensor& pixels_ICYX) {
    const int64_t num_images = pixels_ICYX.size(0), patch = config_.patch_size,
                  grid = config_.image_size / patch;
    const int64_t P = grid * grid, D = config_.hidden_size;
    const at::Tensor patches_IPV = normalize_pixels(pixels_ICYX, spec_, class_embedding_.scalar_type())
                                       .narrow(2, 0, grid * patch)
                                       .narrow(3, 0, grid * patch)
                                       .reshape({num_images, 3, grid, patch, grid, patch})
                                       .permute({0, 2, 4, 1, 3, 5})
                                       .reshape({num_images, P, 3 * patch * patch});
    const at::Tensor embedded_IPD = at::linear(patches_IPV, patch_embedding_.reshape({D, 3 * patch * patch}));
    const at::Tensor x_IND =
        at::cat({class_embedding_.expand({num_images, 1, D}), embedded_IPD}, 1) + position_embedding_;
    return layer_norm(x_IND, pre_norm_weight_, pre_norm_bias_);
  }

  at::Tensor run_block(const ClipBlock& block, const at::Tensor& x_IND) const {
    const int64_t num_images = x_IND.size(0), N = x_IND.size(1), D = x_IND.size(2);
    const int64_t H = config_.num_attention_heads, K = D / H;
    at::Tensor h_IND = layer_norm(x_IND, block.norm1_weight, block.norm1_bias);
    const std::vector<at::Tensor> qkv_IHNK = at::linear(h_IND, block.qkv_weight, block.qkv_bias)
                                                 .view({num_images, N, 3, H, K})
                                                 .permute({2, 0, 3, 1, 4})
                                                 .unbind(0);
    const at::Tensor attended_IHNK = at::scaled_dot_product_attention(qkv_IHNK[0], qkv_IHNK[1], qkv_IHNK[2]);
    h_IND = at::linear(attended_IHNK.transpose(1, 2).reshape({num_images, N, D}), block.out_weight,
                       block.out_bias);
    const at::Tensor middle_IND = add_residual(h_IND, x_IND);

    at::Tensor h_INF = at::linear(layer_norm(middle_IND, block.norm2_weight, block.norm2_bias),
                                  block.fc1_weight, block.fc1_bias);
    h_INF = config_.hidden_act == "gelu" ? exact_gelu(std::move(h_INF)) : quick_gelu(std::move(h_INF));
    return add_residual(at::linear(h_INF, block.fc2_weight, block.fc2_bias), middle_IND);
  }

  ClipConfig config_;
  ImageSpec spec_;
  int64_t num_blocks_run_ = 0;
  bool drop_class_token_ = true;
  at::Tensor class_embedding_, patch_embedding_, position_embedding_;  // [D], [D, 3, patch, patch], [N, D]
  at::Tensor pre_norm_weight_, pre_norm_bias_, post_norm_weight_, post_norm_bias_;  // [D]
  std::vector<ClipBlock> blocks_;
};

std::unique_ptr<VisionTower> make_clip(const Json& config, const Json& preprocessor,
                                       const VisionFeatures& features) {
  // A CLIPModel's config.json holds both towers'; ours is one part of it.
  const bool both = config.contains("vision_config") && config["vision_config"].is_object();
  return std::make_unique<ClipTower>(both ? config["vision_config"] : config, preprocessor, features);
}

void init_clip(VisionTower& tower, uint64_t seed) { static_cast<ClipTower&>(tower).init(seed); }

}  // namespace

const VisionTowerSpec& clip_spec() {
  static const VisionTowerSpec spec{"clip", {"clip_vision_model", "clip"}, make_clip, init_clip, true};
  return spec;
}

}  // namespace caldera
