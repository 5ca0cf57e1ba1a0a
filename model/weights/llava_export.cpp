#include "model/weights/llava_export.h"

#include "base/error.h"
#include "model/vision/towers.h"
#include "model/weights/export_parts.h"
#include "model/weights/model_readme.h"
#include "model/weights/torch_pickle_write.h"

namespace caldera {
namespace {

// HF's classic names to LLaVA's. Its projector is a Sequential: layer i (from 1) is number 2 (i - 1), GELUs
// between; a single layer is the Linear itself.
std::string llava_name(const std::string& name, const std::string& mm_projector_type) {
  static const std::string language = "language_model.", tower = "vision_tower.",
                           projector = "multi_modal_projector.linear_";
  if (name.starts_with(language)) return name.substr(language.size());
  if (name.starts_with(tower)) return "model.vision_tower." + name;
  CALDERA_ASSERT(name.starts_with(projector));
  const std::string rest = name.substr(projector.size());  // "2.weight"
  const std::string parameter = rest.substr(rest.find('.'));
  if (mm_projector_type == "linear") return "model.mm_projector" + parameter;
  return fmt::format("model.mm_projector.{}{}", 2 * (std::stoi(rest) - 1), parameter);
}

TensorList llava_tensors(const NamedTensors& tensors, const std::string& mm_projector_type,
                         const TensorValues& values) {
  TensorList list;
  for (const NamedTensor& named : tensors)
    list.emplace_back(llava_name(named.name, mm_projector_type), value_of(named, values));
  return list;
}

struct Family {
  const char *model_type, *llava_type, *architecture;
};
constexpr Family kFamilies[] = {{"llama", "llava_llama", "LlavaLlamaForCausalLM"},
                                {"mistral", "llava_mistral", "LlavaMistralForCausalLM"}};

const Family* family_of(const LlavaModel& model) {
  const Json config = model.language->config();
  const auto* found = std::find_if(std::begin(kFamilies), std::end(kFamilies), [&](const Family& family) {
    return config.at("model_type") == family.model_type;
  });
  return found == std::end(kFamilies) ? nullptr : found;
}

Json llava_config(const LlavaModel& model, const ModelCard& card, const LlavaExportOptions& options) {
  const Family& family = *family_of(model);
  Json config = model.language->config();
  config["architectures"] = {family.architecture};
  config["model_type"] = family.llava_type;
  config["dtype"] = config["torch_dtype"] = dtype_name(options.dtype);
  put_special_ids(config, options.bos_token_id, options.eos_token_id, options.pad_token_id);
  config["use_mm_proj"] = true;
  config["mm_vision_tower"] = options.mm_vision_tower;
  config["mm_hidden_size"] = model.vision->hidden_size();
  config["mm_projector_type"] = model.mm_projector_type;
  config["mm_vision_select_layer"] = model.features.vision_feature_layer;
  config["mm_vision_select_feature"] = drops_class_token(model.features) ? "patch" : "cls_patch";
  config["mm_patch_merge_type"] = "flat";
  config["mm_resampler_type"] = nullptr;
  config["mm_use_im_start_end"] = false;
  config["mm_use_im_patch_token"] = false;
  config["image_aspect_ratio"] = card.image_aspect_ratio;
  config["tune_mm_mlp_adapter"] = false;
  config["freeze_mm_mlp_adapter"] = false;
  config["unfreeze_mm_vision_tower"] = false;
  config["tokenizer_model_max_length"] = options.model_max_length;
  config["tokenizer_padding_side"] = "right";
  return config;
}

void write_card(const LlavaModel& model, ModelCard card, const fs::path& folder) {
  if (card.vocab_size == 0) card.vocab_size = model.language->vocab_size();
  write_json(folder / "caldera.json", {{"card", to_json(card)}});
}

}  // namespace

void check_original_llava(const LlavaModel& model) {
  CALDERA_CHECK(
      model.vision->config().at("model_type") == "clip_vision_model", ConfigError,
      "--format llava: the original LLaVA loads CLIP towers only, not this model's {}; export hf instead",
      model.vision->id());
  CALDERA_CHECK(
      family_of(model) != nullptr, ConfigError,
      "--format llava: the original LLaVA has LLaMA and Mistral decoders, not this model's {}; export hf "
      "instead",
      model.language->id());
}

void save_original_llava(LlavaModel& model, const ModelCard& card, const LlavaExportOptions& options,
                         const fs::path& folder) {
  check_original_llava(model);
  write_weights_folder(folder, llava_tensors(model.tensors(), model.mm_projector_type, options.values),
                       options.max_shard_bytes, options.dtype);
  write_json(
      folder / "generation_config.json",
      generation_config(*model.language, options.bos_token_id, options.eos_token_id, options.pad_token_id));
  write_card(model, card, folder);
  write_model_readme(model, card, llava_usage(options.mm_vision_tower), folder);
  write_json(folder / "config.json", llava_config(model, card, options));
}

void save_original_projector(LlavaModel& model, const ModelCard& card, const LlavaExportOptions& options,
                             const fs::path& folder) {
  check_original_llava(model);
  CALDERA_CHECK(model.mm_projector_type != "identity", ConfigError,
                "--part projector: an identity projector has no weights");
  write_torch_pickle(
      folder / "mm_projector.bin",
      llava_tensors(model.component_tensors("projector"), model.mm_projector_type, options.values),
      options.dtype);
  Json config = llava_config(model, card, options);
  config["tune_mm_mlp_adapter"] = true;
  write_json(folder / "config.json", config);
}

}  // namespace caldera
