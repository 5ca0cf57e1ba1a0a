// A model from its base and an adapter.
#include <algorithm>

#include "base/error.h"
#include "model/weights/adapters.h"
#include "model/weights/json_fields.h"
#include "model/weights/llava_config.h"

namespace caldera {
namespace {

// What an adapter was trained on: a whole model, or (the original LLaVA's way) a decoder alone, with the
// tower named in the adapter's own config.json and the projector beside the adapter.
LoadedModel load_base(const fs::path& base, const fs::path& folder, const Adapter& adapter) {
  CALDERA_CHECK(
      !base.empty() && fs::is_directory(base), CheckpointError,
      "{}: an adapter for the base model \"{}\", which is no folder here; name it with --model-base",
      folder.string(), base.string());
  const Json base_config =
      fs::exists(base / "config.json") ? read_config(base / "config.json") : Json::object();
  if (base_config.empty() || is_hf_llava(base_config) || is_original_llava(base_config))
    return load_llava(base);
  const bool has_config = fs::exists(folder / "config.json");
  const Json config = has_config ? read_config(folder / "config.json") : Json::object();
  CALDERA_CHECK(
      is_original_llava(config), CheckpointError,
      "{}: the base model {} is a decoder alone, and no config.json beside the adapter names a vision tower "
      "(mm_vision_tower)",
      folder.string(), base.string());
  const OriginalLlava original = read_original_llava(folder, config);
  CALDERA_CHECK(!original.tower_folder.empty(), CheckpointError,
                "{}: mm_vision_tower \"{}\" is no folder here, nor in HF's cache",
                (folder / "config.json").string(), original.vision_tower);
  const bool has_projector =
      std::any_of(adapter.tensors.begin(), adapter.tensors.end(),
                  [](const auto& named) { return named.first.starts_with("multi_modal_projector."); });
  CALDERA_CHECK(has_projector, CheckpointError, "{}: no projector: looked for non_lora_trainables.bin",
                folder.string());
  if (fs::is_directory(base) && !has_weights(base)) open_weights_folder(base);  // throws: no random base
  LoadedModel loaded;
  loaded.folder = base;
  loaded.card = read_model_card(folder);
  loaded.model = build_llava({.vision_tower = original.tower_folder.string(),
                              .language_model = base.string(),
                              .mm_projector_type = original.mm_projector_type,
                              .features = original.features});
  return loaded;
}

}  // namespace

LoadedModel load_stage_1(const fs::path& folder, const Json& config, const fs::path& model_base) {
  const std::string where = (folder / "config.json").string();
  CALDERA_CHECK(!model_base.empty() && fs::exists(model_base), CheckpointError,
                "{}: holds the projector alone (mm_projector.bin, the original LLaVA's stage 1); name the "
                "decoder that it was "
                "trained on with --model-base, got \"{}\"",
                folder.string(), model_base.string());
  const OriginalLlava original = read_original_llava(folder, config);
  CALDERA_CHECK(!original.tower_folder.empty(), CheckpointError,
                "{}: mm_vision_tower \"{}\" is no folder here, nor in HF's cache", where,
                original.vision_tower);
  if (fs::is_directory(model_base) && !has_weights(model_base))
    open_weights_folder(model_base);  // throws: no random base
  LoadedModel loaded;
  loaded.folder = model_base;
  loaded.card = read_model_card(folder);
  loaded.model = build_llava({.vision_tower = original.tower_folder.string(),
                              .language_model = model_base.string(),
                              .mm_projector_type = original.mm_projector_type,
                              .features = original.features,
                              .overlays = {{(folder / "mm_projector.bin").string(), {"projector"}}}});
  return loaded;
}

// The base with the adapter merged. A folder that this program wrote holds the base's build, others name a
// folder.
LoadedModel load_with_adapter(const fs::path& folder, const fs::path& model_base) {
  const Adapter adapter = read_adapter(folder);
  const fs::path card_file = folder / "caldera.json";
  const Json caldera = fs::exists(card_file) ? read_config(card_file) : Json::object();
  LoadedModel loaded;
  if (model_base.empty() && caldera.contains("build")) {
    BuildSpec spec = build_spec_from_json(caldera["build"], card_file.string());
    spec.lora.reset();
    loaded.model = build_llava(spec);
    loaded.folder = folder;
  } else {
    loaded = load_base(model_base.empty() ? fs::path(adapter.base_model) : model_base, folder, adapter);
    if (fs::exists(folder / "tokenizer.model") || fs::exists(folder / "tokenizer.json"))
      loaded.folder = folder;
  }
  if (caldera.contains("card")) loaded.card = read_model_card(folder);
  merge_adapter(*loaded.model, adapter);
  return loaded;
}

}  // namespace caldera
