// Finding a model among a run's folders, and loading what is found.
#include "base/error.h"
#include "base/strings.h"
#include "model/weights/adapters.h"
#include "model/weights/checks.h"
#include "model/weights/gguf_llava.h"
#include "model/weights/json_fields.h"
#include "model/weights/llava_config.h"
#include "model/weights/load.h"
#include "model/weights/names.h"
#include "model/weights/vocabulary.h"

namespace caldera {
namespace {

// A step's checkpoint counts only once its manifest is written: that is its last file.
bool is_step(const fs::path& folder) {
  return fs::exists(folder / "caldera.json") && fs::exists(folder / "manifest.json");
}

std::vector<fs::path> subfolders(const fs::path& folder) {
  std::vector<fs::path> result;
  if (!fs::is_directory(folder)) return result;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.is_directory() && entry.path().filename().string().find(".tmp-") == std::string::npos)
      result.push_back(entry.path());
  std::sort(result.begin(), result.end());
  return result;
}

// final/, else the step that "latest" names, else the highest finished step; empty where there is none.
fs::path model_of_stage(const fs::path& stage) {
  if (fs::exists(stage / "final" / "config.json")) return stage / "final";
  const fs::path steps = stage / "checkpoints";
  if (fs::is_regular_file(stage / "latest")) {
    const std::string name = strip(read_file(stage / "latest"));
    if (name.starts_with("step-") && fs::path(name).filename() == name && is_step(steps / name))
      return steps / name;
  }
  const std::vector<fs::path> folders = subfolders(steps);
  for (auto folder = folders.rbegin(); folder != folders.rend(); ++folder)
    if (is_step(*folder)) return *folder;
  return {};
}

// A run's stages in the order of stages.json; without it, whatever looks like one.
std::vector<fs::path> stages_of_run(const fs::path& run) {
  std::vector<fs::path> stages;
  const fs::path file = run / "stages.json";
  if (!fs::exists(file)) {
    for (const fs::path& folder : subfolders(run))
      if (!model_of_stage(folder).empty()) stages.push_back(folder);
    CALDERA_CHECK(stages.size() <= 1, CheckpointError,
                  "{}: several stages ({}, {}, ...) and no stages.json that orders them; name one of them",
                  run.string(), stages[0].filename().string(), stages[1].filename().string());
    return stages;
  }
  Json names;
  try {
    names = read_json(file);
  } catch (const Error& error) {
    throw CheckpointError(error.what());
  }
  CALDERA_CHECK(names.is_array(), CheckpointError, "{}: expected a list of stage names", file.string());
  for (const Json& name : names) {
    const bool plain = name.is_string() &&
                       fs::path(name.get<std::string>()).filename() == name.get<std::string>() &&
                       name != "." && name != "..";
    CALDERA_CHECK(plain, CheckpointError, "{}: expected the names of folders beside it, got {}",
                  file.string(), json_line(name));
    stages.push_back(run / name.get<std::string>());
  }
  return stages;
}

Json object_field(const Json& config, const std::string& where, const char* key) {
  CALDERA_CHECK(config.contains(key) && config[key].is_object(), CheckpointError,
                "{}: {}: expected an object", where, key);
  return config[key];
}

std::unique_ptr<LlavaModel> load_hf_llava(const fs::path& folder, int64_t vocab_size) {
  const std::unique_ptr<TensorSource> file = open_weights_folder(folder);
  const UnpaddedVocabulary source(*file, vocab_size);
  std::unique_ptr<LlavaModel> model = make_hf_llava(folder, vocab_size, source);
  const bool tied = model->language->config().value("tie_word_embeddings", false);
  const auto name_in_source = [&source](const std::string& name) { return find_llava_name(name, source); };
  const std::vector<std::string> leftovers =
      load_tensors(needed_of_tower(model->tensors(), *model->vision, model->features, source, name_in_source,
                                   /*fill=*/true),
                   source, name_in_source);
  refuse_leftovers(leftovers, source,
                   [tied](const std::string& name) { return tied && name.ends_with("lm_head.weight"); });
  return model;
}

}  // namespace

Json hf_text_config(const Json& config, const std::string& where) {
  refuse_quantized(config, where);
  const Json given = object_field(config, where, "text_config");
  const std::string model_type = text_field(given, where, "model_type", "llama");
  Json text = find_language_model(model_type, where + ": text_config").class_defaults;
  text.update(given);
  text["model_type"] = model_type;
  if (boolean_field(config, where, "tie_word_embeddings", false)) text["tie_word_embeddings"] = true;
  return text;
}

std::unique_ptr<LlavaModel> make_hf_llava(const fs::path& folder, int64_t vocab_size,
                                          const TensorSource& source) {
  const std::string where = (folder / "config.json").string();
  const Json config = read_config(folder / "config.json");
  const std::string model_type = text_field(config, where, "model_type", "");
  CALDERA_CHECK(model_type == "llava" || model_type == "caldera_llava", CheckpointError,
                "{}: model_type: expected llava or caldera_llava, got \"{}\"", where, model_type);
  const std::string activation = text_field(config, where, "projector_hidden_act", "gelu");
  CALDERA_CHECK(activation == "gelu", CheckpointError,
                "{}: projector_hidden_act: only gelu is supported, got {}", where, activation);
  CALDERA_CHECK(boolean_field(config, where, "multimodal_projector_bias", true), CheckpointError,
                "{}: multimodal_projector_bias: only true is supported", where);

  auto model = std::make_unique<LlavaModel>();
  model->features = hf_vision_features(config, where);
  model->mm_projector_type = text_field(config, where, "mm_projector_type", "mlp2x_gelu");

  const Json vision = object_field(config, where, "vision_config");
  const VisionTowerSpec& tower = find_vision_tower(
      text_field(vision, where, "model_type", "clip_vision_model"), where + ": vision_config");
  model->vision = tower.make(vision, read_preprocessor_config(folder), model->features);
  CALDERA_CHECK(
      !tower.in_hf_llava || model->vision->has_class_token() ||
          model->features.vision_feature_select_strategy == "cls_patch",
      CheckpointError,
      "{}: vision_feature_select_strategy: default would drop the first patch of a tower without a class "
      "token; expected full",
      where);

  Json text = hf_text_config(config, where);
  if (vocab_size > 0) text["vocab_size"] = vocab_size;
  keep_end_tokens(text, folder);
  untie_differing_head(text, source);
  model->language =
      find_language_model(text_field(text, where, "model_type", ""), where + ": text_config").make(text);
  model->projector =
      make_projector(model->mm_projector_type, model->vision->hidden_size(), model->language->hidden_size());
  return model;
}

fs::path resolve_model_folder(const fs::path& dir) {
  CALDERA_CHECK(dir.extension() != ".gguf" || fs::is_directory(dir), CheckpointError,
                "{}: a GGUF file holds a part of a LLaVA; name the folder with the decoder's and its "
                "mmproj*.gguf",
                dir.string());
  CALDERA_CHECK(fs::is_directory(dir), CheckpointError, "{}: no such folder", dir.string());
  if (fs::exists(dir / "config.json") || is_adapter_folder(dir) || find_gguf_llava(dir)) return dir;
  if (fs::exists(dir / "caldera.json")) {
    CALDERA_CHECK(is_step(dir), CheckpointError, "{}: not a finished checkpoint: no manifest.json",
                  dir.string());
    return dir;
  }
  if (const fs::path found = model_of_stage(dir); !found.empty()) return found;
  const std::vector<fs::path> stages = stages_of_run(dir);
  for (auto stage = stages.rbegin(); stage != stages.rend(); ++stage)
    if (const fs::path found = model_of_stage(*stage); !found.empty()) return found;
  throw CheckpointError(
      fmt::format("{}: no model: looked for config.json, caldera.json, mmproj*.gguf with a decoder's .gguf, final/, "
                  "checkpoints/step-*/ with manifest.json, and stages with these",
                  dir.string()));
}

LoadedModel load_llava(const fs::path& dir, const fs::path& model_base) {
  LoadedModel loaded;
  loaded.folder = resolve_model_folder(dir);
  if (is_adapter_folder(loaded.folder)) return load_with_adapter(loaded.folder, model_base);
  if (const auto gguf = find_gguf_llava(loaded.folder)) {
    loaded.card = read_gguf_card(*gguf);
    loaded.model = load_gguf_llava(*gguf);
    return loaded;
  }
  const fs::path card_file = loaded.folder / "caldera.json";
  Json caldera = Json::object();
  if (fs::exists(card_file)) caldera = read_config(card_file);
  loaded.card = read_model_card(loaded.folder);
  if (fs::exists(loaded.folder / "config.json")) {
    const Json config = read_config(loaded.folder / "config.json");
    if (is_stage_1(loaded.folder, config)) return load_stage_1(loaded.folder, config, model_base);
    loaded.model = is_original_llava(config)
                       ? load_original_llava(loaded.folder, config, loaded.card.vocab_size)
                       : load_hf_llava(loaded.folder, loaded.card.vocab_size);
    return loaded;
  }
  CALDERA_CHECK(caldera.contains("build"), CheckpointError, "{}: expected a \"build\" of the model",
                card_file.string());
  BuildSpec spec = build_spec_from_json(caldera["build"], card_file.string());
  if (spec.lora) return load_with_adapter(loaded.folder, model_base);
  spec.overlays.push_back({loaded.folder.string(), {"vision_tower", "projector", "language_model"}});
  loaded.model = build_llava(spec);
  return loaded;
}

}  // namespace caldera
