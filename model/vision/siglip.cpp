// SigLIP's vision transformer (arXiv 2303.15343), as HF's SiglipVisionModel computes it: no class token, no
// norm before the blocks. Legend: see vit.h.

#include <cmath>

#include "base/aten.h"
#include "base/error.h"
#include "model/vision/towers.h"
#include "model/vision/vit.h"
#include "model/weights/json_fields.h"

namespace caldera {
namespace {

constexpr const char* kSiglipWhere = "the SigLIP tower's config.json";

// HF's SiglipVisionConfig and SiglipImageProcessor.
const VitConfig kDefaults = {.patch_size = 16, .layer_norm_eps = 1e-6, .hidden_act = "gelu_pytorch_tanh"};
const ImageSpec kImages = {
    .image_mean = {0.5f, 0.5f, 0.5f}, .image_std = {0.5f, 0.5f, 0.5f}, .keeps_aspect = false};

class SiglipTower : public VisionTower {
 public:
  SiglipTower(const Json& config, const Json& preprocessor, const VisionFeatures& features)
      : config_(parse_vit_config(config, kSiglipWhere, kDefaults)),
        has_head_(boolean_field(config, kSiglipWhere, "vision_use_head", true)),
        spec_(image_spec_from(preprocessor, kImages)),
        num_blocks_run_(num_blocks_before(features.vision_feature_layer, config_.num_hidden_layers)),
        blocks_(config_) {
    drops_class_token(features);  // there is none: either choice gives all patches, a third is refused
    const int64_t D = config_.hidden_size, F = config_.intermediate_size, patch = config_.patch_size;
    patch_weight_ = at::empty({D, 3, patch, patch});
    patch_bias_ = at::empty({D});
    position_embedding_ = at::empty({config_.num_patches(), D});
    post_norm_weight_ = at::empty({D});
    post_norm_bias_ = at::empty({D});
    if (has_head_)
      head_ = {{"probe", at::empty({1, 1, D})},
               {"attention.in_proj_weight", at::empty({3 * D, D})},
               {"attention.in_proj_bias", at::empty({3 * D})},
               {"attention.out_proj.weight", at::empty({D, D})},
               {"attention.out_proj.bias", at::empty({D})},
               {"layernorm.weight", at::empty({D})},
               {"layernorm.bias", at::empty({D})},
               {"mlp.fc1.weight", at::empty({F, D})},
               {"mlp.fc1.bias", at::empty({F})},
               {"mlp.fc2.weight", at::empty({D, F})},
               {"mlp.fc2.bias", at::empty({D})}};
    spec_.image_size = config_.image_size;
    spec_.num_image_tokens = config_.num_patches();
  }

  at::Tensor forward(const at::Tensor& pixels_ICYX) override {
    check_pixels(pixels_ICYX, spec_);
    const at::Tensor patches_IPD = embed_patches(pixels_ICYX, spec_, patch_weight_, patch_bias_);
    return blocks_.forward(patches_IPD + position_embedding_, num_blocks_run_);
  }

  NamedTensors tensors() override {
    const std::string root = "vision_model.";
    NamedTensors list = {{root + "embeddings.patch_embedding.weight", &patch_weight_},
                         {root + "embeddings.patch_embedding.bias", &patch_bias_},
                         {root + "embeddings.position_embedding.weight", &position_embedding_}};
    append(list, blocks_.tensors(root + "encoder.layers"));
    // Not used by LLaVA, which reads hidden states; listed so that files stay complete.
    list.push_back({root + "post_layernorm.weight", &post_norm_weight_});
    list.push_back({root + "post_layernorm.bias", &post_norm_bias_});
    for (auto& [name, tensor] : head_) list.push_back({root + "head." + name, &tensor});
    return list;
  }

  void set_image_size(int64_t image_size) override {
    check_image_size(image_size, config_.patch_size);
    position_embedding_ = resize_positions(position_embedding_, 0, image_size / config_.patch_size);
    config_.image_size = spec_.image_size = image_size;
    spec_.num_image_tokens = config_.num_patches();
  }

  ImageSpec image_spec() const override { return spec_; }
  int64_t hidden_size() const override { return config_.hidden_size; }
  const char* id() const override { return "siglip"; }

  Json config() const override {
    Json config = {{"architectures", {"SiglipVisionModel"}}, {"model_type", "siglip_vision_model"}};
    config.update(to_json(config_));
    if (!has_head_) config["vision_use_head"] = false;
    return config;
  }

  // HF's SiglipPreTrainedModel._init_weights; its convolution and probe follow torch's and its own rules.
  void init(uint64_t seed) {
    const double width = static_cast<double>(config_.hidden_size);
    for (NamedTensor& named : tensors()) {
      at::Tensor value = named.value();
      const std::string& name = named.name;
      const auto has = [&name](const char* part) { return name.find(part) != std::string::npos; };
      if (has("position_embedding"))
        init_normal_(value, std::pow(width, -0.5), seed, name);
      else if (has("probe"))
        init_uniform_(value, std::sqrt(3.0 / width), seed, name);
      else if (has("norm"))
        value.fill_(name.ends_with("weight") ? 1.0 : 0.0);
      else if (has("mlp.") && name.ends_with("bias"))
        init_normal_(value, 1e-6, seed, name);
      else if (name.ends_with("bias"))
        value.zero_();
      else if (has("patch_embedding"))  // lecun_normal
        init_normal_(value,
                     std::sqrt(static_cast<double>(value.size(0)) / static_cast<double>(value.numel())), seed,
                     name);
      else  // xavier_uniform
        init_uniform_(value, std::sqrt(6.0 / static_cast<double>(value.size(0) + value.size(1))), seed, name);
    }
  }

 private:
  VitConfig config_;
  bool has_head_;  // SigLIP's pooling, which LLaVA does not use
  ImageSpec spec_;
  int64_t num_blocks_run_;
  VitBlocks blocks_;
  at::Tensor patch_weight_, patch_bias_, position_embedding_;  // [D, 3, patch, patch], [D], [P, D]
  at::Tensor post_norm_weight_, post_norm_bias_;               // [D]
  std::vector<std::pair<std::string, at::Tensor>> head_;
};

std::unique_ptr<VisionTower> make_siglip(const Json& config, const Json& preprocessor,
                                         const VisionFeatures& features) {
  return std::make_unique<SiglipTower>(vision_part(config), preprocessor, features);
}

void init_siglip(VisionTower& tower, uint64_t seed) { static_cast<SiglipTower&>(tower).init(seed); }

}  // namespace

const VisionTowerSpec& siglip_spec() {
  static const VisionTowerSpec spec{
      "siglip", {"siglip_vision_model", "siglip"}, make_siglip, init_siglip, true};
  return spec;
}

}  // namespace caldera
