// A model from its build specification: parts, then what was trained on top.
#include "base/error.h"
#include "model/weights/json_fields.h"
#include "model/weights/load.h"
#include "model/weights/names.h"
#include "model/weights/vocabulary.h"

namespace caldera {
namespace {

// A file of weights, a folder of them, or what the original LLaVA leaves of a stage that trained the
// projector alone or beside an adapter.
std::unique_ptr<TensorSource> open_overlay(const fs::path& path) {
  if (!fs::is_directory(path)) return open_weights_file(path);
  for (const char* name : {"mm_projector.bin", "non_lora_trainables.bin"})
    if (!has_weights(path) && fs::exists(path / name)) return open_weights_file(path / name);
  return open_weights_folder(path);
}

void lay_over(LlavaModel& model, const BuildSpec::Overlay& overlay) {
  const fs::path path = overlay.path;
  const std::unique_ptr<TensorSource> file = open_overlay(path);
  const UnpaddedVocabulary source(*file, fs::is_directory(path) ? read_model_card(path).vocab_size : 0);
  NamedTensors held;
  for (const std::string& component : overlay.components)
    for (const NamedTensor& named : model.component_tensors(component))
      if (source.has(find_llava_name(named.name, source))) held.push_back(named);
  CALDERA_CHECK(!held.empty(), CheckpointError, "{}: holds no tensor of {}", path.string(),
                fmt::join(overlay.components, ", "));
  load_tensors(held, source, [&source](const std::string& name) { return find_llava_name(name, source); });
}

}  // namespace

Json to_json(const BuildSpec& spec) {
  Json overlays = Json::array();
  for (const BuildSpec::Overlay& overlay : spec.overlays)
    overlays.push_back({{"path", overlay.path}, {"components", overlay.components}});
  Json json = {{"vision_tower", spec.vision_tower},
               {"language_model", spec.language_model},
               {"mm_projector_type", spec.mm_projector_type},
               {"vision_feature_layer", spec.features.vision_feature_layer},
               {"vision_feature_select_strategy", spec.features.vision_feature_select_strategy},
               {"image_size", spec.image_size},
               {"seed", spec.seed},
               {"overlays", overlays}};
  if (spec.lora) json["lora"] = to_json(*spec.lora);
  return json;
}

BuildSpec build_spec_from_json(const Json& json, const std::string& where) {
  CALDERA_CHECK(json.is_object(), CheckpointError, "{}: build: expected an object", where);
  BuildSpec spec;
  spec.vision_tower = text_field(json, where, "vision_tower", "");
  spec.language_model = text_field(json, where, "language_model", "");
  CALDERA_CHECK(!spec.vision_tower.empty() && !spec.language_model.empty(), CheckpointError,
                "{}: build: vision_tower and language_model must be named", where);
  spec.mm_projector_type = text_field(json, where, "mm_projector_type", spec.mm_projector_type);
  spec.features.vision_feature_layer =
      integer_field(json, where, "vision_feature_layer", spec.features.vision_feature_layer, -1024, 1024);
  spec.features.vision_feature_select_strategy =
      text_field(json, where, "vision_feature_select_strategy", spec.features.vision_feature_select_strategy);
  spec.image_size = integer_field(json, where, "image_size", 0, 0, 8192);
  if (json.contains("seed")) {
    CALDERA_CHECK(json["seed"].is_number_unsigned(), CheckpointError,
                  "{}: build: seed: expected an unsigned integer", where);
    spec.seed = json["seed"].get<uint64_t>();
  }
  const Json overlays = json.value("overlays", Json::array());
  CALDERA_CHECK(overlays.is_array(), CheckpointError, "{}: build: overlays: expected a list", where);
  for (const Json& item : overlays) {
    CALDERA_CHECK(item.is_object() && item.contains("components") && item["components"].is_array(),
                  CheckpointError, "{}: build: overlays: expected objects with \"path\" and \"components\"",
                  where);
    BuildSpec::Overlay overlay;
    overlay.path = text_field(item, where, "path", "");
    for (const Json& component : item["components"]) {
      const bool known =
          component == "projector" || component == "language_model" || component == "vision_tower";
      CALDERA_CHECK(known, CheckpointError,
                    "{}: build: overlays: expected projector, language_model or vision_tower, got {}", where,
                    json_line(component));
      overlay.components.push_back(component.get<std::string>());
    }
    spec.overlays.push_back(std::move(overlay));
  }
  if (json.contains("lora")) spec.lora = lora_config_from_json(json["lora"], where + ": build: lora");
  return spec;
}

Json to_json(const ModelCard& card) {
  return {{"conversation_template", card.conversation_template},
          {"image_aspect_ratio", card.image_aspect_ratio},
          {"vocab_size", card.vocab_size},
          {"provenance", card.provenance}};
}

ModelCard model_card_from_json(const Json& json, const std::string& where) {
  CALDERA_CHECK(json.is_object(), CheckpointError, "{}: card: expected an object", where);
  ModelCard card;
  card.conversation_template = text_field(json, where, "conversation_template", "");
  card.image_aspect_ratio = text_field(json, where, "image_aspect_ratio", card.image_aspect_ratio);
  card.vocab_size = integer_field(json, where, "vocab_size", 0, 0, int64_t{1} << 31);
  if (json.contains("provenance")) card.provenance = Json(json["provenance"]);
  return card;
}

std::unique_ptr<LlavaModel> build_llava(const BuildSpec& spec) {
  auto model = std::make_unique<LlavaModel>();
  model->features = spec.features;
  model->mm_projector_type = spec.mm_projector_type;
  model->vision = load_vision_tower(spec.vision_tower, spec.features, spec.seed, spec.image_size);
  model->language = load_language_model(spec.language_model, spec.seed);
  model->projector =
      make_projector(spec.mm_projector_type, model->vision->hidden_size(), model->language->hidden_size());
  init_projector(*model->projector, spec.seed);
  for (const BuildSpec::Overlay& overlay : spec.overlays) lay_over(*model, overlay);
  if (spec.lora)
    for (Linear* linear : model->language->linears()) linear->attach(*spec.lora, spec.seed);
  return model;
}

}  // namespace caldera
