#include "model/weights/llava_config.h"

#include <cstdlib>

#include "base/error.h"
#include "base/strings.h"
#include "model/weights/checks.h"
#include "model/weights/json_fields.h"
#include "model/weights/names.h"
#include "model/weights/vocabulary.h"

namespace caldera {
namespace {

fs::path environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? fs::path() : fs::path(value);
}

// The snapshot that HF's cache holds of a model "ORGANISATION/NAME".
fs::path find_in_hub_cache(const std::string& name) {
  fs::path cache = environment("HF_HUB_CACHE");
  if (cache.empty()) {
    fs::path home = environment("HF_HOME");
    if (home.empty()) home = environment("HOME") / ".cache" / "huggingface";
    cache = home / "hub";
  }
  const fs::path model = cache / ("models--" + replace_all(name, "/", "--"));
  if (!fs::is_regular_file(model / "refs" / "main")) return {};
  const std::string commit = strip(read_file(model / "refs" / "main"));
  const fs::path snapshot = model / "snapshots" / commit;
  return fs::path(commit).filename() == commit && fs::exists(snapshot / "config.json") ? snapshot
                                                                                       : fs::path();
}

fs::path find_tower(const fs::path& folder, const std::string& name) {
  if (name.empty() || name.find('\0') != std::string::npos) return {};
  for (const fs::path& candidate : {folder / name, fs::path(name)})
    if (fs::exists(candidate / "config.json")) return candidate;
  return find_in_hub_cache(name);
}

// Which decoder it is. LLaVA-NeXT's models of Qwen2 call themselves "llava", as the first LLaVA did: there
// the class tells.
std::string original_decoder(const Json& config, const std::string& where) {
  static const std::map<std::string, std::string> kDecoders = {
      {"llava", "llama"}, {"llava_llama", "llama"}, {"llava_mistral", "mistral"}, {"llava_qwen", "qwen2"}};
  static const std::map<std::string, std::string> kClasses = {{"LlavaLlamaForCausalLM", "llama"},
                                                              {"LlavaMistralForCausalLM", "mistral"},
                                                              {"LlavaQwenForCausalLM", "qwen2"}};
  const std::string model_type = text_field(config, where, "model_type", "");
  const auto decoder = kDecoders.find(model_type);
  CALDERA_CHECK(
      decoder != kDecoders.end(), CheckpointError,
      "{}: model_type \"{}\": of the original LLaVA's models, llava, llava_llama, llava_mistral and "
      "llava_qwen are read",
      where, model_type);
  const Json architectures = config.value("architectures", Json());
  const bool is_named = architectures.is_array() && architectures.size() == 1 && architectures[0].is_string();
  if (model_type != "llava" || !is_named) return decoder->second;
  const auto named = kClasses.find(architectures[0].get<std::string>());
  CALDERA_CHECK(named != kClasses.end(), CheckpointError,
                "{}: architectures: of the original LLaVA's classes, LlavaLlamaForCausalLM, "
                "LlavaMistralForCausalLM and "
                "LlavaQwenForCausalLM are read, got {}",
                where, json_line(architectures));
  return named->second;
}

}  // namespace

bool is_hf_llava(const Json& config) {
  return config.contains("text_config") && config.contains("vision_config") &&
         config.contains("model_type") &&
         (config["model_type"] == "llava" || config["model_type"] == "caldera_llava");
}

bool is_original_llava(const Json& config) {
  return config.contains("mm_vision_tower") && !config.contains("vision_config");
}

bool is_stage_1(const fs::path& folder, const Json& config) {
  return is_original_llava(config) && !has_weights(folder) && fs::exists(folder / "mm_projector.bin");
}

OriginalLlava read_original_llava(const fs::path& folder, const Json& config) {
  const std::string where = (folder / "config.json").string();
  OriginalLlava original;
  refuse_quantized(config, where);
  original.text = config;
  original.text["model_type"] = original_decoder(config, where);
  keep_end_tokens(original.text, folder);
  CALDERA_CHECK(
      !boolean_field(config, where, "mm_use_im_start_end", false), CheckpointError,
      "{}: mm_use_im_start_end: pictures between <im_start> and <im_end> (LLaVA before v1.5) are not "
      "supported",
      where);
  const std::string merge = text_field(config, where, "mm_patch_merge_type", "flat");
  CALDERA_CHECK(merge == "flat", CheckpointError,
                "{}: mm_patch_merge_type \"{}\": several tiles a picture (LLaVA-NeXT) are not supported",
                where, merge);

  original.image_aspect_ratio = text_field(config, where, "image_aspect_ratio", kAspectSquare);
  CALDERA_CHECK(original.image_aspect_ratio == kAspectSquare || original.image_aspect_ratio == kAspectPad,
                CheckpointError, "{}: image_aspect_ratio: expected {} or {}, got {}", where, kAspectSquare,
                kAspectPad, original.image_aspect_ratio);
  original.features.vision_feature_layer =
      integer_field(config, where, "mm_vision_select_layer", -2, -1024, 1024);
  original.features.vision_feature_select_strategy =
      text_field(config, where, "mm_vision_select_feature", "patch");
  original.mm_projector_type = text_field(config, where, "mm_projector_type", "linear");
  original.vision_tower = text_field(config, where, "mm_vision_tower", "");
  original.tower_folder = find_tower(folder, original.vision_tower);
  return original;
}

std::unique_ptr<LlavaModel> load_original_llava(const fs::path& folder, const Json& config,
                                                int64_t vocab_size) {
  const std::string where = (folder / "config.json").string();
  OriginalLlava original = read_original_llava(folder, config);
  CALDERA_CHECK(!original.tower_folder.empty(), CheckpointError,
                "{}: mm_vision_tower \"{}\" is no folder beside it or here, nor in HF's cache (HF_HOME); put "
                "the tower's "
                "folder there, or name its folder in config.json",
                where, original.vision_tower);
  if (vocab_size > 0) original.text["vocab_size"] = vocab_size;

  const std::unique_ptr<TensorSource> file = open_weights_folder(folder);
  const UnpaddedVocabulary source(*file, vocab_size);
  auto model = std::make_unique<LlavaModel>();
  model->features = original.features;
  model->mm_projector_type = original.mm_projector_type;
  model->vision = load_vision_tower(original.tower_folder, original.features);
  const std::string text_type = original.text["model_type"].get<std::string>();
  untie_differing_head(original.text, source);
  model->language = find_language_model(text_type, where).make(original.text);
  model->projector =
      make_projector(model->mm_projector_type, model->vision->hidden_size(), model->language->hidden_size());

  NamedTensors wanted = model->component_tensors("projector");
  append(wanted, model->component_tensors("language_model"));
  const std::vector<std::string> names = source.names();
  const bool holds_tower = std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return name.starts_with("model.vision_tower.");
  });
  const auto name_in_source = [&source](const std::string& name) { return find_llava_name(name, source); };
  if (holds_tower)  // what it lacks stays as the named tower has it
    append(wanted, needed_of_tower(model->component_tensors("vision_tower"), *model->vision, model->features,
                                   source, name_in_source, /*fill=*/false));
  const bool tied = boolean_field(original.text, where, "tie_word_embeddings", false);
  const std::vector<std::string> leftovers = load_tensors(wanted, source, name_in_source);
  refuse_leftovers(leftovers, source, [tied](const std::string& name) {
    return name == "model.image_newline" || (tied && name == "lm_head.weight");
  });
  return model;
}

}  // namespace caldera
