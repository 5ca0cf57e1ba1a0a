// Keys, names and types are those that llama.cpp's clip.cpp reads for projector type "mlp" (its legacy
// convert_image_encoder_to_gguf.py wrote them).
#include "base/error.h"
#include "base/log.h"
#include "base/words.h"
#include "model/vision/vit.h"
#include "model/weights/gguf_encode.h"
#include "model/weights/gguf_export_parts.h"
#include "model/weights/gguf_names.h"

namespace caldera {
namespace {

// Blocks that run: llama.cpp, like LLaVA, needs none beyond the feature layer.
int64_t num_blocks(const LlavaModel& model) {
  return num_blocks_before(model.features.vision_feature_layer,
                           model.vision->config().at("num_hidden_layers"));
}

bool runs(const std::string& name, int64_t blocks) {
  const std::string prefix = "vision_model.encoder.layers.";
  return !name.starts_with(prefix) || std::stoll(name.substr(prefix.size())) < blocks;
}

// What follows the blocks of a CLIP or SigLIP tower: LLaVA reads hidden states before it.
bool is_unused(const std::string& name) {
  return name.starts_with("vision_model.post_layernorm.") || name.starts_with("vision_model.head.");
}

GgufFields mmproj_fields(const LlavaModel& model, const GgufExportOptions& options) {
  const Json tower = model.vision->config();
  const ImageSpec spec = model.vision->image_spec();
  const auto size = [&tower](const char* key) { return tower.at(key).get<uint32_t>(); };
  const auto blocks = static_cast<uint32_t>(num_blocks(model));
  GgufFields fields = general_fields("clip", "mmproj", options);
  const auto add = [&](const char* key, GgufField value) {
    fields.emplace_back(std::string("clip.") + key, std::move(value));
  };
  add("has_vision_encoder", true);
  add("has_text_encoder", false);  // the next two: for llama.cpp of before 2025
  add("has_llava_projector", true);
  add("projector_type", std::string("mlp"));
  add("use_gelu", tower.at("hidden_act") != "quick_gelu");
  // For reading the file back: llama.cpp's GELU is the one by tanh, whichever was meant.
  fields.emplace_back("caldera.hidden_act", tower.at("hidden_act").get<std::string>());
  add("vision.image_size", static_cast<uint32_t>(spec.image_size));
  add("vision.patch_size", size("patch_size"));
  add("vision.embedding_length", size("hidden_size"));
  add("vision.feed_forward_length", size("intermediate_size"));
  add("vision.projection_dim", static_cast<uint32_t>(model.language->hidden_size()));
  add("vision.attention.head_count", size("num_attention_heads"));
  add("vision.attention.layer_norm_epsilon", tower.at("layer_norm_eps").get<float>());
  // Both: without the second llama.cpp runs one block fewer than the first says.
  add("vision.block_count", blocks);
  add("vision.feature_layer", std::vector<int32_t>{static_cast<int32_t>(blocks)});
  add("vision.image_mean", std::vector<float>(spec.image_mean.begin(), spec.image_mean.end()));
  add("vision.image_std", std::vector<float>(spec.image_std.begin(), spec.image_std.end()));
  add("vision.image_aspect_ratio", options.image_aspect_ratio);
  add("vision.mm_patch_merge_type", std::string("flat"));
  return fields;
}

}  // namespace

void check_gguf_mmproj(const LlavaModel& model) {
  const Json tower = model.vision->config();
  const std::string model_type = tower.at("model_type");
  CALDERA_CHECK(model_type == "clip_vision_model" || model_type == "siglip_vision_model", ConfigError,
                "--format gguf: llama.cpp's LLaVA has CLIP and SigLIP towers, not this model's {}; export hf "
                "instead, or --part language_model for the decoder alone",
                model.vision->id());
  CALDERA_CHECK(
      model.mm_projector_type == "mlp2x_gelu", ConfigError,
      "--format gguf: llama.cpp's LLaVA projector has two layers with a GELU after the first "
      "(mlp2x_gelu); this model's, {}, cannot be written so that it gives the same features; export "
      "hf instead, or --part language_model for the decoder alone",
      model.mm_projector_type);
  const std::string& strategy = model.features.vision_feature_select_strategy;
  CALDERA_CHECK(!model.vision->has_class_token() || strategy == "patch" || strategy == "default", ConfigError,
                "--format gguf: llama.cpp leaves the class token's feature out, but the model's "
                "vision_feature_select_strategy is {}, which uses it",
                strategy);
}

void save_gguf_mmproj(LlavaModel& model, const GgufExportOptions& given, const std::filesystem::path& file) {
  check_gguf_mmproj(model);
  GgufExportOptions options = given;
  options.type = mmproj_ggml_type(given.type);
  if (options.image_aspect_ratio != kAspectPad)
    log_warning(
        "{}: llama.cpp pads pictures that are not square; this model learned from ones whose edges were "
        "cropped (image_aspect_ratio "
        "{}), so give it square pictures",
        file.filename().string(), options.image_aspect_ratio);
  if (model.vision->has_class_token())
    log_warning(
        "{}: llama.cpp since May 2025 puts a CLIP tower's class token behind the patches and gives other "
        "features "
        "(ggml-org/llama.cpp#25814); docs/formats.md has the one-line correction",
        file.filename().string());
  const int64_t blocks = num_blocks(model);
  std::vector<GgufTensorToWrite> tensors;
  for (const NamedTensor& named : model.vision->tensors()) {
    if (!runs(named.name, blocks) || is_unused(named.name)) continue;
    const std::string name = gguf_tower_name(named.name);
    CALDERA_CHECK(!name.empty(), ConfigError,
                  "--format gguf: llama.cpp has no place for the tower's tensor {}", named.name);
    GgmlType type = options.type;
    if (name == "v.position_embd.weight") type = GgmlType::kF32;
    if (name == "v.patch_embd.weight" && type != GgmlType::kF16)
      type = GgmlType::kF32;  // its convolution knows two types
    tensors.push_back(gguf_tensor(name, value_of(named, options.values), type));
  }
  for (const NamedTensor& named : model.projector->tensors())
    tensors.push_back(
        gguf_tensor(gguf_projector_name(named.name), value_of(named, options.values), options.type));
  write_gguf(file, mmproj_fields(model, options), tensors);
}

}  // namespace caldera
