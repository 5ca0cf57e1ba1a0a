// Folders that other programs load.
#include <algorithm>

#include "base/error.h"
#include "base/log.h"
#include "model/weights/export_parts.h"
#include "model/weights/load.h"
#include "model/weights/model_readme.h"

namespace caldera {
namespace {

bool fits_hf_llava(const LlavaModel& model) {
  const VisionTowerSpec& tower =
      find_vision_tower(model.vision->config()["model_type"].get<std::string>(), "export");
  return tower.in_hf_llava && model.mm_projector_type == "mlp2x_gelu";
}

TensorList list_of(const NamedTensors& tensors, const TensorValues& values) {
  TensorList list;
  for (const NamedTensor& named : tensors) list.emplace_back(named.name, value_of(named, values));
  return list;
}

// The vocabulary's matrix with rows added up to `num_rows`, each the mean of the rows there are.
at::Tensor pad_rows(const at::Tensor& matrix, int64_t num_rows) {
  const at::Tensor mean = matrix.to(at::kFloat).mean(0, /*keepdim=*/true).to(matrix.scalar_type());
  return at::cat({matrix, mean.expand({num_rows - matrix.size(0), matrix.size(1)})});
}

Json image_processor(const ImageSpec& spec, const std::string& image_aspect_ratio) {
  const bool pad = image_aspect_ratio == kAspectPad, crops = spec.keeps_aspect;
  // Only LLaVA's own processor pads to a square; older releases know CLIP's and SigLIP's alone.
  const char* type = pad ? "LlavaImageProcessor" : crops ? "CLIPImageProcessor" : "SiglipImageProcessor";
  const Json square = {{"height", spec.image_size}, {"width", spec.image_size}};
  Json processor = {{"image_processor_type", type},
                    {"do_convert_rgb", true},
                    {"do_pad", pad},
                    {"do_resize", true},
                    {"size", crops ? Json{{"shortest_edge", spec.image_size}} : square},
                    {"resample", 3},  // bicubic
                    {"do_center_crop", crops},
                    {"do_rescale", true},
                    {"rescale_factor", 1.0 / 255.0},
                    {"do_normalize", true},
                    {"image_mean", spec.image_mean},
                    {"image_std", spec.image_std}};
  if (crops) processor["crop_size"] = square;
  return processor;
}

int64_t patch_size_of(const LlavaModel& model) {
  return model.vision->config().value("patch_size", int64_t{32});
}

const char* hf_select_strategy(const LlavaModel& model) {
  const std::string& strategy = model.features.vision_feature_select_strategy;
  // HF's "default" drops the first token whatever it is.
  const bool drops = model.vision->has_class_token() && (strategy == "patch" || strategy == "default");
  return drops ? "default" : "full";
}

Json llava_config(const LlavaModel& model, const ExportOptions& options, int64_t vocab_size) {
  const bool hf = fits_hf_llava(model);
  Json text = model.language->config();
  text["vocab_size"] = vocab_size;
  text["dtype"] = text["torch_dtype"] = dtype_name(options.dtype);
  put_special_ids(text, options.bos_token_id, options.eos_token_id, options.pad_token_id);
  Json config = {{"architectures", {hf ? "LlavaForConditionalGeneration" : "CalderaLlava"}},
                 {"model_type", hf ? "llava" : "caldera_llava"},
                 {"dtype", dtype_name(options.dtype)},
                 {"torch_dtype", dtype_name(options.dtype)},
                 {"ignore_index", kIgnoreIndex},
                 {"image_token_index", options.image_token_id},
                 {"image_seq_length", model.vision->image_spec().num_image_tokens},
                 {"projector_hidden_act", "gelu"},
                 {"multimodal_projector_bias", true},
                 {"vision_feature_layer", model.features.vision_feature_layer},
                 {"vision_feature_select_strategy", hf_select_strategy(model)},
                 {"tie_word_embeddings", text.value("tie_word_embeddings", false)},
                 {"text_config", text},
                 {"vision_config", model.vision->config()}};
  if (options.pad_token_id >= 0) config["pad_token_id"] = options.pad_token_id;
  if (!hf) config["mm_projector_type"] = model.mm_projector_type;
  return config;
}

}  // namespace

const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    default:
      throw Error(fmt::format("cannot export weights as {}", c10::toString(dtype)));
  }
}

void put_special_ids(Json& config, int64_t bos, int64_t eos, int64_t pad) {
  for (const auto& [key, id] :
       {std::pair("bos_token_id", bos), {"eos_token_id", eos}, {"pad_token_id", pad}}) {
    if (id < 0) continue;
    if (config.contains(key) &&
        config[key].is_array()) {  // several end tokens: the tokenizer's is one of them
      if (std::find(config[key].begin(), config[key].end(), id) == config[key].end())
        config[key].push_back(id);
    } else {
      config[key] = id;
    }
  }
}

Json generation_config(const LanguageModel& language, int64_t bos, int64_t eos, int64_t pad) {
  Json generation = {{"_from_model_config", true}};
  const Json end = language.config().value("eos_token_id", Json());
  if (end.is_array()) generation["eos_token_id"] = end;
  put_special_ids(generation, bos, eos, pad);
  return generation;
}

void save_hf_llava(LlavaModel& model, const ModelCard& card, const ExportOptions& options,
                   const fs::path& folder) {
  CALDERA_ASSERT(options.image_token_id >= 0);
  if (!fits_hf_llava(model))
    log_warning(
        "{}: transformers' LlavaForConditionalGeneration cannot hold a {} tower with a {} projector; written "
        "as "
        "model_type caldera_llava, which this program loads",
        folder.string(), model.vision->id(), model.mm_projector_type);

  const int64_t trained_vocab = model.language->vocab_size();
  const int64_t highest_id = std::max(options.image_token_id, options.pad_token_id);
  const int64_t vocab_size = highest_id < trained_vocab ? trained_vocab : (highest_id + 64) / 64 * 64;
  TensorList tensors = list_of(model.tensors(), options.values);
  if (vocab_size > trained_vocab)
    for (auto& [name, value] : tensors)
      if (name.ends_with("embed_tokens.weight") || name.ends_with("lm_head.weight"))
        value = pad_rows(value, vocab_size);
  write_weights_folder(folder, tensors, options.max_shard_bytes, options.dtype);

  const Json processor = image_processor(model.vision->image_spec(), card.image_aspect_ratio);
  Json preprocessor = processor;
  preprocessor["processor_class"] = "LlavaProcessor";
  write_json(folder / "preprocessor_config.json", preprocessor);
  write_json(folder / "processor_config.json",
             {{"processor_class", "LlavaProcessor"},
              {"image_processor", processor},
              {"image_token", kImagePlaceholder},
              {"patch_size", patch_size_of(model)},
              {"num_additional_image_tokens", model.vision->has_class_token() ? 1 : 0},
              {"vision_feature_select_strategy", hf_select_strategy(model)}});
  write_json(
      folder / "generation_config.json",
      generation_config(*model.language, options.bos_token_id, options.eos_token_id, options.pad_token_id));
  ModelCard written = card;
  if (written.vocab_size == 0) written.vocab_size = trained_vocab;
  write_json(folder / "caldera.json", {{"card", to_json(written)}});
  write_model_readme(model, written, hf_usage(fits_hf_llava(model)), folder);
  // Last: without it the folder is no model yet.
  write_json(folder / "config.json", llava_config(model, options, vocab_size));
}

void save_hf_component(LlavaModel& model, const std::string& part, at::ScalarType dtype,
                       const fs::path& folder, int64_t max_shard_bytes, const TensorValues& values) {
  const bool is_tower = part == "vision_tower";
  CALDERA_CHECK(is_tower || part == "language_model", ConfigError,
                "\"{}\" has no folder of its own; vision_tower and language_model have", part);
  Json config = is_tower ? model.vision->config() : model.language->config();
  config["dtype"] = config["torch_dtype"] = dtype_name(dtype);
  write_weights_folder(folder,
                       list_of(is_tower ? model.vision->tensors() : model.language->tensors(), values),
                       max_shard_bytes, dtype);
  if (is_tower)
    write_json(folder / "preprocessor_config.json",
               image_processor(model.vision->image_spec(), kAspectSquare));
  write_json(folder / "config.json", config);
}

}  // namespace caldera
