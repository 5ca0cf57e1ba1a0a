#include "model/weights/inspect.h"

#include <algorithm>

#include "base/chat_template.h"
#include "base/error.h"
#include "base/lfs_pointer.h"
#include "base/strings.h"
#include "model/weights/adapters.h"
#include "model/weights/checks.h"
#include "model/weights/inspect_parts.h"
#include "model/weights/json_fields.h"
#include "model/weights/llava_config.h"
#include "model/weights/names.h"
#include "model/weights/vocabulary.h"

namespace caldera {
namespace {

ModelReport start(const fs::path& path, const char* kind) {
  ModelReport report;
  report.path = path;
  report.kind = kind;
  return report;
}

void add_card(const fs::path& folder, ModelReport& report) {
  const ModelCard card = read_model_card(folder);
  report.facts.emplace_back("conversation template",
                            card.conversation_template.empty() ? "not recorded" : card.conversation_template);
  report.facts.emplace_back("image_aspect_ratio", card.image_aspect_ratio);
  report.provenance = card.provenance;
}

// The weights' files, and those that others need beside them.
void add_files(const fs::path& folder, bool needs_tokenizer, ModelReport& report) {
  report.facts.emplace_back("weights files", std::to_string(weights_files(folder).size()));
  const bool sentencepiece = fs::exists(folder / "tokenizer.model"),
             json = fs::exists(folder / "tokenizer.json");
  report.facts.emplace_back("tokenizer", sentencepiece ? "SentencePiece (tokenizer.model)"
                                         : json        ? "tokenizer.json"
                                                       : "none");
  for (const char* name : {"tokenizer.model", "tokenizer.json", "tokenizer_config.json"})
    if (fs::exists(folder / name)) refuse_lfs_pointer(MappedFile(folder / name).bytes(), (folder / name).string());
  if (needs_tokenizer && !sentencepiece && !json)
    report.missing.emplace_back("tokenizer.model or tokenizer.json");
  const bool has_template = !read_chat_template(folder).empty();
  report.facts.emplace_back("chat template", has_template ? "yes" : "none");
}

// Without weights, nothing but the configuration can be told. Weights that no loader reads are refused as it
// refuses them.
std::unique_ptr<TensorSource> weights_of(const fs::path& folder, ModelReport& report) {
  if (has_weights(folder)) return open_weights_folder(folder);
  refuse_unread_weights(folder);
  report.missing.emplace_back("model.safetensors");
  return nullptr;
}

void add_llava(const fs::path& folder, const VisionFeatures& features, const fs::path& tower_folder,
               const Json& text_config, const std::string& projector_type, ModelReport& report) {
  const std::string where = (folder / "config.json").string();
  LlavaModel shell;  // the memory of its weights is never touched
  std::vector<WantedPart> parts;
  const int64_t vocab_size = read_model_card(folder).vocab_size;
  Json text = text_config;
  if (vocab_size > 0) text["vocab_size"] = vocab_size;
  const std::unique_ptr<TensorSource> file = weights_of(folder, report);
  std::optional<UnpaddedVocabulary> source;
  if (file != nullptr) untie_differing_head(text, source.emplace(*file, vocab_size));
  shell.language = find_language_model(text_field(text, where, "model_type", ""), where).make(text);
  if (!tower_folder.empty()) {
    shell.vision = make_vision_tower(tower_folder, features);
    shell.projector =
        make_projector(projector_type, shell.vision->hidden_size(), shell.language->hidden_size());
    parts.push_back(
        {"vision_tower", describe(*shell.vision, features), shell.component_tensors("vision_tower")});
    parts.push_back({"projector", projector_type, shell.component_tensors("projector")});
  }
  parts.push_back({"language_model", describe(*shell.language), shell.component_tensors("language_model")});
  if (file == nullptr) {
    for (const WantedPart& part : parts) report.parts.push_back({part.name, part.what, {}});
    return;
  }
  const auto name_in_source = [&source](const std::string& name) { return find_llava_name(name, *source); };
  if (!tower_folder.empty())
    parts[0].tensors =
        needed_of_tower(parts[0].tensors, *shell.vision, features, *source, name_in_source, /*fill=*/false);
  const std::vector<std::string> names = source->names();
  const bool holds_tower = std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return name.find("vision_tower.") != std::string::npos;
  });
  if (!holds_tower && is_original_llava(read_config(folder / "config.json")))
    std::erase_if(
        parts, [](const WantedPart& part) { return part.name == "vision_tower"; });  // it is named, not held
  const bool tied = shell.language->config().value("tie_word_embeddings", false);
  deal_tensors(
      parts, *source, name_in_source,
      [&](const std::string& name) {
        return (tied && name.ends_with("lm_head.weight")) || name == "model.image_newline";
      },
      report);
}

ModelReport inspect_hf_llava(const fs::path& folder, const Json& config) {
  const std::string where = (folder / "config.json").string();
  const bool plain = text_field(config, where, "model_type", "") == "llava";
  ModelReport report = start(folder, plain ? "Hugging Face LLaVA (LlavaForConditionalGeneration)"
                                           : "Caldera LLaVA (parts that transformers' class cannot hold)");
  add_card(folder, report);
  add_files(folder, true, report);
  for (const char* name : {"preprocessor_config.json", "processor_config.json"})
    if (!fs::exists(folder / name)) report.facts.emplace_back(name, "none");
  add_llava(folder, hf_vision_features(config, where), folder, hf_text_config(config, where),
            text_field(config, where, "mm_projector_type", "mlp2x_gelu"), report);
  return report;
}

ModelReport inspect_original_llava(const fs::path& folder, const Json& config) {
  const OriginalLlava original = read_original_llava(folder, config);
  const bool projector_alone = is_stage_1(folder, config);
  ModelReport report =
      start(folder, projector_alone ? "original LLaVA, stage 1 (projector alone)" : "original LLaVA");
  report.facts.emplace_back("mm_vision_tower", original.vision_tower);
  report.facts.emplace_back("tower's folder",
                            original.tower_folder.empty() ? "not here" : original.tower_folder.string());
  if (projector_alone) {
    const std::unique_ptr<TensorSource> source = open_weights_file(folder / "mm_projector.bin");
    report.parts.push_back({"projector", original.mm_projector_type, tensor_reports(*source)});
    return report;
  }
  add_card(folder, report);
  add_files(folder, true, report);
  add_llava(folder, original.features, original.tower_folder, original.text, original.mm_projector_type,
            report);
  return report;
}

// A tower or a decoder by itself.
ModelReport inspect_component(const fs::path& folder, const Json& config) {
  const std::string where = (folder / "config.json").string();
  const std::string model_type = text_field(config, where, "model_type", "");
  const auto towers = vision_towers();
  const bool is_tower = std::any_of(towers.begin(), towers.end(), [&](const VisionTowerSpec& spec) {
    return std::find(spec.model_types.begin(), spec.model_types.end(), model_type) != spec.model_types.end();
  });
  ModelReport report = start(folder, is_tower ? "vision tower" : "language model");
  refuse_quantized(config, where);
  add_files(folder, false, report);
  const std::unique_ptr<TensorSource> source = weights_of(folder, report);
  std::unique_ptr<VisionTower> tower;
  std::unique_ptr<LanguageModel> language;
  WantedPart part;
  if (is_tower) {
    tower = make_vision_tower(folder, {});
    part = {"vision_tower", describe(*tower, {}), tower->tensors()};
  } else {
    Json text = config;
    if (source != nullptr) untie_differing_head(text, *source);
    language = find_language_model(model_type, where).make(text);
    part = {"language_model", describe(*language), language->tensors()};
  }
  if (source == nullptr) {
    report.parts.push_back({part.name, part.what, {}});
    return report;
  }
  const std::string prefix = "vision_model.", probe = "embeddings.patch_embedding.weight";
  const bool stripped = is_tower && !source->has(prefix + probe) && source->has(probe);
  const auto name_in_source = [&](const std::string& name) {
    return stripped && name.starts_with(prefix) ? name.substr(prefix.size()) : name;
  };
  if (is_tower)
    part.tensors = needed_of_tower(part.tensors, *tower, {}, *source, name_in_source, /*fill=*/false);
  deal_tensors(
      {part}, *source, name_in_source,
      [&](const std::string& name) {
        return name.starts_with("text_model.") || name.starts_with("logit_") ||
               name.ends_with("_projection.weight") ||
               (!is_tower && name == "lm_head.weight" &&
                language->config().value("tie_word_embeddings", false));
      },
      report);
  return report;
}

ModelReport inspect_step(const fs::path& folder) {
  const fs::path file = folder / "caldera.json";
  const Json caldera = read_config(file);
  ModelReport report = start(folder, "step checkpoint");
  add_card(folder, report);
  CALDERA_CHECK(caldera.contains("build"), CheckpointError, "{}: expected a \"build\" of the model",
                file.string());
  const BuildSpec build = build_spec_from_json(caldera["build"], file.string());
  for (const auto& [name, path] :
       {std::pair("vision tower", build.vision_tower), std::pair("language model", build.language_model)}) {
    report.facts.emplace_back(name, path);
    if (!fs::exists(path)) report.missing.push_back(fmt::format("{} {}", name, path));
  }
  report.facts.emplace_back("projector", build.mm_projector_type);
  for (const BuildSpec::Overlay& overlay : build.overlays) {
    report.facts.emplace_back("laid over",
                              fmt::format("{} ({})", overlay.path, join(overlay.components, ", ")));
    if (!fs::exists(overlay.path)) report.missing.push_back(overlay.path);
  }
  for (const char* name : {"optimizer.safetensors", "trainer_state.json"})
    if (!fs::exists(folder / name)) report.missing.emplace_back(name);
  const std::unique_ptr<TensorSource> source = weights_of(folder, report);
  if (source != nullptr)
    report.parts.push_back({"trained in this stage", "float32 masters", tensor_reports(*source)});
  return report;
}

ModelReport inspect_adapter(const fs::path& folder) {
  ModelReport report = start(folder, "low-rank adapter (PEFT)");
  const Adapter adapter = read_adapter(folder);
  report.facts.emplace_back("base model", adapter.base_model.empty() ? "not named" : adapter.base_model);
  report.facts.emplace_back("lora_r", std::to_string(adapter.lora.lora_r));
  report.facts.emplace_back("lora_alpha", fmt::format("{}", adapter.lora.lora_alpha));
  report.facts.emplace_back("use_rslora", adapter.lora.use_rslora ? "true" : "false");
  PartReport lora{"adapter", join(adapter.lora.target_modules, ", "), {}},
      whole{"trained as a whole", "", {}};
  for (const auto& [name, tensor] : adapter.tensors)
    (is_lora_name(name) ? lora : whole).tensors.push_back(report_of_tensor(name, tensor));
  report.parts.push_back(std::move(lora));
  if (!whole.tensors.empty()) report.parts.push_back(std::move(whole));
  return report;
}

ModelReport inspect_file(const fs::path& file) {
  if (file.extension() == ".gguf") return inspect_gguf(file);
  ModelReport report = start(file, "weights file");
  report.parts.push_back({"tensors", file.filename().string(), tensor_reports(*open_weights_file(file))});
  return report;
}

// An export for llama.cpp, or what somebody put there.
ModelReport inspect_ggufs(const fs::path& folder, const std::vector<fs::path>& files) {
  ModelReport report = start(folder, "folder of GGUF files");
  for (const fs::path& file : files) {
    ModelReport one = inspect_gguf(file);
    for (PartReport& part : one.parts) {
      part.name = fmt::format("{}: {}", file.filename().string(), part.name);
      report.parts.push_back(std::move(part));
    }
    for (auto& [key, value] : one.facts)
      report.facts.emplace_back(file.filename().string() + ": " + key, value);
    if (report.provenance.is_null()) report.provenance = one.provenance;
  }
  return report;
}

}  // namespace

ModelReport inspect_model(const fs::path& path) {
  CALDERA_CHECK(fs::exists(path), CheckpointError, "{}: no such file or folder", path.string());
  if (!fs::is_directory(path)) return inspect_file(path);
  std::vector<fs::path> ggufs;
  for (const auto& entry : fs::directory_iterator(path))
    if (entry.path().extension() == ".gguf") ggufs.push_back(entry.path());
  std::sort(ggufs.begin(), ggufs.end());
  if (!ggufs.empty() && !fs::exists(path / "config.json")) return inspect_ggufs(path, ggufs);
  if (!fs::exists(path / "config.json") && fs::exists(path / "mm_projector.bin"))
    return inspect_file(path / "mm_projector.bin");
  const fs::path folder = resolve_model_folder(path);
  if (is_adapter_folder(folder)) return inspect_adapter(folder);
  if (!fs::exists(folder / "config.json")) return inspect_step(folder);
  const Json config = read_config(folder / "config.json");
  if (is_original_llava(config)) return inspect_original_llava(folder, config);
  return is_hf_llava(config) ? inspect_hf_llava(folder, config) : inspect_component(folder, config);
}

Json to_json(const ModelReport& report) {
  Json parts = Json::array();
  for (const PartReport& part : report.parts) {
    Json tensors = Json::array();
    for (const TensorReport& tensor : part.tensors)
      tensors.push_back({{"name", tensor.name},
                         {"dtype", tensor.dtype},
                         {"shape", tensor.shape},
                         {"num_bytes", tensor.num_bytes}});
    parts.push_back({{"name", part.name}, {"what", part.what}, {"tensors", tensors}});
  }
  Json facts = Json::array();
  for (const auto& [key, value] : report.facts) facts.push_back({key, value});
  return {{"path", report.path.string()},
          {"kind", report.kind},
          {"facts", facts},
          {"parts", parts},
          {"missing", report.missing},
          {"leftover", report.leftover},
          {"provenance", report.provenance}};
}

}  // namespace caldera
