// A model from its build specification: parts, then what was trained on top.
#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/strings.h"
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

// A projector that comes in part, or with layers too many, belongs to another mm_projector_type.
void check_whole_projector(LlavaModel& model, const TensorSource& source) {
  std::vector<std::string> missing, left;
  std::set<std::string> used;
  for (const NamedTensor& named : model.component_tensors("projector")) {
    const std::string name = find_llava_name(named.name, source);
    if (source.has(name))
      used.insert(name);
    else
      missing.push_back(named.name);
  }
  for (const std::string& name : source.names()) {
    const bool is_projector = name.find("mm_projector.") != std::string::npos ||
                              name.find("multi_modal_projector.") != std::string::npos;
    if (is_projector && !used.contains(name)) left.push_back(name);
  }
  const bool fits = missing.empty() && left.empty();
  const bool has_none = used.empty() && left.empty();
  const auto listed = [](const std::vector<std::string>& names) {
    return names.empty() ? "none" : join(names, ", ");
  };
  CALDERA_CHECK(fits || has_none, CheckpointError,
                "{}: not a projector of type {}: missing: {}; left over: {}. Set model.mm_projector_type to "
                "what the file "
                "holds, or name another file",
                source.where(used.empty() ? left[0] : *used.begin()), model.mm_projector_type,
                listed(missing), listed(left));
}

void lay_over(LlavaModel& model, const BuildSpec::Overlay& overlay) {
  const fs::path path = overlay.path;
  const std::unique_ptr<TensorSource> file = open_overlay(path);
  const UnpaddedVocabulary source(*file, fs::is_directory(path) ? read_model_card(path).vocab_size : 0);
  const auto& components = overlay.components;
  if (std::find(components.begin(), components.end(), "projector") != components.end())
    check_whole_projector(model, source);
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

std::vector<std::string> random_parts(const BuildSpec& spec) {
  const auto is_laid_over = [&spec](const std::string& part) {
    return std::any_of(spec.overlays.begin(), spec.overlays.end(),
                       [&part](const BuildSpec::Overlay& overlay) {
                         return std::find(overlay.components.begin(), overlay.components.end(), part) !=
                                overlay.components.end();
                       });
  };
  std::vector<std::string> parts;
  if (!has_weights(spec.vision_tower) && !is_laid_over("vision_tower")) parts.emplace_back("vision_tower");
  if (spec.mm_projector_type != "identity" && !is_laid_over("projector")) parts.emplace_back("projector");
  if (fs::is_directory(spec.language_model) && !has_weights(spec.language_model) &&
      !is_laid_over("language_model"))
    parts.emplace_back("language_model");
  return parts;
}

std::string check_random_parts(const BuildSpec& spec, const std::vector<std::string>& trainable,
                               const std::vector<std::string>& allowed) {
  const auto is_in = [](const std::vector<std::string>& list, const std::string& part) {
    return std::find(list.begin(), list.end(), part) != list.end();
  };
  std::vector<std::string> told;
  for (const std::string& part : random_parts(spec)) {
    const bool learns = is_in(trainable, part) && !(part == "language_model" && spec.lora);
    const std::string why =
        part == "projector" ? "model.pretrain_mm_mlp_adapter is not set, and no earlier stage trains it"
                            : fmt::format("{} holds config.json and no weights",
                                          part == "vision_tower" ? spec.vision_tower : spec.language_model);
    CALDERA_CHECK(learns || is_in(allowed, part), ConfigError,
                  "the {} begins at random ({}), and this stage does not train it{}: give it weights, add it "
                  "to the stage's "
                  "trainable, or, where that is meant, name it in model.random_parts: [{}]",
                  part, why, is_in(trainable, part) ? " but for low-rank adapters" : "", part);
    told.push_back(fmt::format("{} ({})", part, why));
  }
  return told.empty() ? "" : "begins at random: " + join(told, "; ");
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
