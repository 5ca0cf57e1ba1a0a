// CLIP's vision transformer (arXiv 2103.00020), as HF's CLIPVisionModel computes it. Legend: see vit.h.

#include <cmath>

#include "base/aten.h"
#include "base/error.h"
#include "model/vision/towers.h"
#include "model/vision/vit.h"
#include "model/weights/json_fields.h"

namespace caldera {
namespace {

constexpr const char* kWhere = "the CLIP tower's config.json";

class ClipTower : public VisionTower {
 public:
  ClipTower(const Json& config, const Json& preprocessor, const VisionFeatures& features)
      : config_(parse_vit_config(config, kWhere, {})),
        projection_dim_(integer_field(config, kWhere, "projection_dim", 512, 1, 1 << 16)),
        initializer_range_(number_field(config, kWhere, "initializer_range", 0.02)),
        initializer_factor_(number_field(config, kWhere, "initializer_factor", 1.0)),
        spec_(image_spec_from(preprocessor, {.image_size = config_.image_size})),
        num_blocks_run_(num_blocks_before(features.vision_feature_layer, config_.num_hidden_layers)),
        drop_class_token_(drops_class_token(features)),
        blocks_(config_) {
    const int64_t D = config_.hidden_size, patch = config_.patch_size;
    class_embedding_ = at::empty({D});
    patch_embedding_ = at::empty({D, 3, patch, patch});
    position_embedding_ = at::empty({config_.num_patches() + 1, D});
    for (at::Tensor* norm : {&pre_norm_weight_, &pre_norm_bias_, &post_norm_weight_, &post_norm_bias_})
      *norm = at::empty({D});
    count_tokens();
  }

  at::Tensor forward(const at::Tensor& pixels_ICYX) override {
    check_pixels(pixels_ICYX, spec_);
    const at::Tensor patches_IPD = embed_patches(pixels_ICYX, spec_, patch_embedding_, {});
    const at::Tensor class_I1D = class_embedding_.expand({pixels_ICYX.size(0), 1, config_.hidden_size});
    const at::Tensor x_IND =
        at::layer_norm(at::cat({class_I1D, patches_IPD}, 1) + position_embedding_, {config_.hidden_size},
                       pre_norm_weight_, pre_norm_bias_, config_.layer_norm_eps);
    const at::Tensor features_IND = blocks_.forward(x_IND, num_blocks_run_);
    return drop_class_token_ ? features_IND.narrow(1, 1, config_.num_patches()) : features_IND;
  }

  NamedTensors tensors() override {
    const std::string root = "vision_model.";
    NamedTensors list = {{root + "embeddings.class_embedding", &class_embedding_},
                         {root + "embeddings.patch_embedding.weight", &patch_embedding_},
                         {root + "embeddings.position_embedding.weight", &position_embedding_},
                         {root + "pre_layrnorm.weight", &pre_norm_weight_},
                         {root + "pre_layrnorm.bias", &pre_norm_bias_}};
    append(list, blocks_.tensors(root + "encoder.layers"));
    // Not used by LLaVA, which reads hidden states; listed so that files stay complete.
    list.push_back({root + "post_layernorm.weight", &post_norm_weight_});
    list.push_back({root + "post_layernorm.bias", &post_norm_bias_});
    return list;
  }

  void set_image_size(int64_t image_size) override {
    check_image_size(image_size, config_.patch_size);
    position_embedding_ = resize_positions(position_embedding_, 1, image_size / config_.patch_size);
    config_.image_size = spec_.image_size = image_size;
    count_tokens();
  }

  ImageSpec image_spec() const override { return spec_; }
  int64_t hidden_size() const override { return config_.hidden_size; }
  bool has_class_token() const override { return true; }
  const char* id() const override { return "clip"; }

  Json config() const override {
    Json config = {{"architectures", {"CLIPVisionModel"}}, {"model_type", "clip_vision_model"}};
    config.update(to_json(config_));
    config["projection_dim"] = projection_dim_;
    config["initializer_range"] = initializer_range_;
    config["initializer_factor"] = initializer_factor_;
    return config;
  }

  // HF's CLIPPreTrainedModel._init_weights, but for the positions.
  void init(uint64_t seed) {
    const double width = static_cast<double>(config_.hidden_size), factor = initializer_factor_;
    const double depth = std::pow(2.0 * static_cast<double>(config_.num_hidden_layers), -0.5);
    for (NamedTensor& named : tensors()) {
      at::Tensor value = named.value();
      const auto has = [&named](const char* part) { return named.name.find(part) != std::string::npos; };
      if (has("class_embedding"))
        init_normal_(value, factor * std::pow(width, -0.5), seed, named.name);
      else if (has("position_embedding"))
        fill_sincos_positions_(value, 1);
      else if (has("_embedding."))
        init_normal_(value, factor * initializer_range_, seed, named.name);
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
  void count_tokens() { spec_.num_image_tokens = config_.num_patches() + (drop_class_token_ ? 0 : 1); }

  VitConfig config_;
  int64_t projection_dim_;
  double initializer_range_, initializer_factor_;
  ImageSpec spec_;
  int64_t num_blocks_run_;
  bool drop_class_token_;
  VitBlocks blocks_;
  at::Tensor class_embedding_, patch_embedding_, position_embedding_;  // [D], [D, 3, patch, patch], [N, D]
  at::Tensor pre_norm_weight_, pre_norm_bias_, post_norm_weight_, post_norm_bias_;  // [D]
};

std::unique_ptr<VisionTower> make_clip(const Json& config, const Json& preprocessor,
                                       const VisionFeatures& features) {
  return std::make_unique<ClipTower>(vision_part(config), preprocessor, features);
}

void init_clip(VisionTower& tower, uint64_t seed) { static_cast<ClipTower&>(tower).init(seed); }

}  // namespace

const VisionTowerSpec& clip_spec() {
  static const VisionTowerSpec spec{"clip", {"clip_vision_model", "clip"}, make_clip, init_clip, true};
  return spec;
}

}  // namespace caldera
