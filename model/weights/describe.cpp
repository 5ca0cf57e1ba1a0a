// What a model's folder says of itself, without its weights.
#include "base/error.h"
#include "model/weights/gguf_llava.h"
#include "model/weights/json_fields.h"
#include "model/weights/llava_config.h"
#include "model/weights/load.h"

namespace caldera {

VisionFeatures hf_vision_features(const Json& config, const std::string& where) {
  constexpr const char* kLayer = "vision_feature_layer";
  VisionFeatures features;
  Json layer = config.contains(kLayer) ? Json(config[kLayer]) : Json(-2);
  if (layer.is_array()) {
    CALDERA_CHECK(layer.size() == 1, CheckpointError, "{}: {}: only a single layer is supported, got {}",
                  where, kLayer, json_line(layer));
    layer = Json(layer[0]);
  }
  features.vision_feature_layer = integer_field({{kLayer, layer}}, where, kLayer, -2, -1024, 1024);
  const std::string strategy = text_field(config, where, "vision_feature_select_strategy", "default");
  CALDERA_CHECK(strategy == "default" || strategy == "full", CheckpointError,
                "{}: vision_feature_select_strategy: expected default or full, got {}", where, strategy);
  features.vision_feature_select_strategy = strategy == "default" ? "patch" : "cls_patch";
  return features;
}

ModelCard read_model_card(const fs::path& folder) {
  const fs::path file = folder / "caldera.json";
  if (fs::exists(file)) {
    const Json caldera = read_config(file);
    if (caldera.contains("card")) return model_card_from_json(caldera["card"], file.string());
  }
  if (const auto gguf = find_gguf_llava(folder)) return read_gguf_card(*gguf);
  ModelCard card;
  if (fs::exists(folder / "config.json")) {
    const Json config = read_config(folder / "config.json");
    if (is_original_llava(config))
      card.image_aspect_ratio = read_original_llava(folder, config).image_aspect_ratio;
    else if (boolean_field(read_preprocessor_config(folder), folder.string(), "do_pad", false))  // LlavaImageProcessor's
      card.image_aspect_ratio = kAspectPad;
  }
  return card;
}

std::optional<ImageSpec> read_image_spec(const fs::path& folder) {
  const fs::path card = folder / "caldera.json", file = folder / "config.json";
  const Json caldera = fs::exists(card) ? read_config(card) : Json::object();
  if (caldera.contains("build")) {
    const BuildSpec build = build_spec_from_json(caldera["build"], card.string());
    if (!fs::exists(fs::path(build.vision_tower) / "config.json")) return {};
    return make_vision_tower(build.vision_tower, build.features, build.image_size)->image_spec();
  }
  if (const auto gguf = find_gguf_llava(folder)) return make_gguf_vision_tower(gguf->mmproj)->image_spec();
  if (!fs::exists(file)) return {};
  const Json config = read_config(file);
  if (is_original_llava(config)) {
    const OriginalLlava original = read_original_llava(folder, config);
    if (original.tower_folder.empty()) return {};
    return make_vision_tower(original.tower_folder, original.features)->image_spec();
  }
  if (!config.contains("vision_config")) return {};
  return make_vision_tower(folder, hf_vision_features(config, file.string()))->image_spec();
}

}  // namespace caldera
