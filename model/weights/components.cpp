// One component from a folder or file of its own.
#include "base/error.h"
#include "base/headway.h"
#include "base/strings.h"
#include "model/weights/checks.h"
#include "model/weights/gguf_weights.h"
#include "model/weights/json_fields.h"
#include "model/weights/llava_config.h"
#include "model/weights/load.h"
#include "model/weights/names.h"
#include "model/weights/vocabulary.h"

namespace caldera {
namespace {

std::string shape_text(at::IntArrayRef shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

// Whether there are weights to read; without them there must be a seed to make them from.
bool weights_or_seed(const fs::path& path, std::optional<uint64_t> fresh_seed) {
  if (has_weights(path)) return true;
  if (!fresh_seed) open_weights_folder(path);  // throws, naming what it looked for
  refuse_unread_weights(path);                 // random beside somebody's weights is never meant
  return false;
}

// A whole LLaVA's folder also serves as the source of one of its parts.
bool is_llava(const Json& config) { return is_hf_llava(config) || is_original_llava(config); }

Json tower_config(const Json& config, const std::string& where) {
  CALDERA_CHECK(
      !is_original_llava(config), CheckpointError,
      "{}: the original LLaVA's folder names its tower (mm_vision_tower) and does not describe it: use that "
      "tower's own folder",
      where);
  refuse_quantized(config, where);
  if (!is_hf_llava(config)) return config;
  Json vision = config["vision_config"];
  CALDERA_CHECK(vision.is_object(), CheckpointError, "{}: vision_config: expected an object", where);
  if (!vision.contains("model_type")) vision["model_type"] = "clip_vision_model";
  return vision;
}

// The decoder's part of a LLaVA's configuration, else all of it. The vocabulary is that of training: an
// export may have padded it.
Json decoder_config(const fs::path& folder, const Json& config) {
  const std::string where = (folder / "config.json").string();
  Json text = config;
  if (is_llava(config)) {
    text =
        is_original_llava(config) ? read_original_llava(folder, config).text : hf_text_config(config, where);
    if (const int64_t vocab_size = read_model_card(folder).vocab_size; vocab_size > 0)
      text["vocab_size"] = vocab_size;
  } else {
    refuse_quantized(config, where);
  }
  keep_end_tokens(text, folder);
  return text;
}

}  // namespace

std::vector<std::string> load_tensors(const NamedTensors& wanted, const TensorSource& source,
                                      const std::function<std::string(const std::string&)>& name_in_source) {
  const at::NoGradGuard no_grad;
  std::vector<std::string> missing;
  std::vector<std::string> names = source.names();
  std::unordered_map<std::string, bool> used;
  for (const NamedTensor& named : wanted) {
    const std::string name = name_in_source ? name_in_source(named.name) : named.name;
    if (!source.has(name)) {
      missing.push_back(name);
      continue;
    }
    used[name] = true;
    at::Tensor value = named.value();
    const std::vector<int64_t> shape = source.shape(name);
    CALDERA_CHECK(
        shape != std::vector<int64_t>{0} || value.numel() == 0, CheckpointError,
        "{}: {}: expected shape {}, got [0]: DeepSpeed's ZeRO-3 leaves such a placeholder where the weights "
        "were "
        "not gathered; gather them (stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py on its "
        "checkpoint)",
        source.where(name), name, shape_text(value.sizes()));
    CALDERA_CHECK(value.sizes() == at::IntArrayRef(shape), CheckpointError,
                  "{}: {}: expected shape {}, got {}", source.where(name), name, shape_text(value.sizes()),
                  shape_text(shape));
    const at::Tensor stored = source.read(name);
    CALDERA_CHECK(stored.is_floating_point() && !c10::isFloat8Type(stored.scalar_type()), CheckpointError,
                  "{}: {}: expected floating-point weights, got {}; is this a quantised checkpoint?",
                  source.where(name), name, c10::toString(stored.scalar_type()));
    value.copy_(stored);
    note_headway();
    check_finite(stored, source.where(name), name);
  }
  if (!missing.empty()) {
    const std::vector<std::string> first(missing.begin(),
                                         missing.begin() + std::min<ptrdiff_t>(5, std::ssize(missing)));
    throw CheckpointError(fmt::format("{}: {} of {} tensors are missing: {}{}", source.where(missing[0]),
                                      missing.size(), wanted.size(), join(first, ", "),
                                      missing.size() > 5 ? ", ..." : ""));
  }
  std::erase_if(names, [&used](const std::string& name) { return used.contains(name); });
  return names;
}

std::unique_ptr<VisionTower> make_vision_tower(const fs::path& path, const VisionFeatures& features,
                                               int64_t image_size) {
  const fs::path config_file = path / "config.json";
  const Json config = read_config(config_file);
  const Json vision = tower_config(config, config_file.string());
  std::unique_ptr<VisionTower> tower =
      find_vision_tower(text_field(vision, config_file.string(), "model_type", ""), config_file.string())
          .make(vision, read_preprocessor_config(path), features);
  if (image_size > 0) tower->set_image_size(image_size);
  return tower;
}

std::unique_ptr<VisionTower> load_vision_tower(const fs::path& path, const VisionFeatures& features,
                                               std::optional<uint64_t> fresh_seed, int64_t image_size) {
  std::unique_ptr<VisionTower> tower = make_vision_tower(path, features);
  if (!weights_or_seed(path, fresh_seed)) {
    find_vision_tower(text_field(tower->config(), path.string(), "model_type", ""), path.string())
        .init(*tower, *fresh_seed);
  } else {
    const std::unique_ptr<TensorSource> source = open_weights_folder(path);
    const Json config = read_config(path / "config.json");
    if (is_llava(config)) {
      const auto name_in_source = [&source](const std::string& name) {
        return find_llava_name("vision_tower." + name, *source);
      };
      load_tensors(
          needed_of_tower(tower->tensors(), *tower, features, *source, name_in_source, /*fill=*/true),
          *source, name_in_source);
    } else {
      // transformers 5 saves CLIPVisionModel without its "vision_model." prefix; a CLIPModel holds a text
      // tower besides.
      const std::string prefix = "vision_model.", probe = "embeddings.patch_embedding.weight";
      const bool stripped = !source->has(prefix + probe) && source->has(probe);
      const auto name_in_source = [&](const std::string& name) {
        return stripped && name.starts_with(prefix) ? name.substr(prefix.size()) : name;
      };
      const std::vector<std::string> leftovers = load_tensors(
          needed_of_tower(tower->tensors(), *tower, features, *source, name_in_source, /*fill=*/true),
          *source, name_in_source);
      refuse_leftovers(leftovers, *source, [](const std::string& name) {
        return name.starts_with("text_model.") || name == "logit_scale" || name == "logit_bias" ||
               name == "text_projection.weight" || name == "visual_projection.weight";
      });
    }
  }
  if (image_size > 0) tower->set_image_size(image_size);
  return tower;
}

std::unique_ptr<LanguageModel> load_language_model(const fs::path& path, std::optional<uint64_t> fresh_seed) {
  if (fs::is_regular_file(path)) {
    const GgufDecoder decoder = open_gguf_decoder(path);
    const LanguageModelSpec& spec =
        find_language_model(decoder.config["model_type"].get<std::string>(), path.string());
    std::unique_ptr<LanguageModel> model = spec.make(decoder.config);
    const std::vector<std::string> leftovers = load_tensors(model->tensors(), *decoder.weights);
    refuse_leftovers(leftovers, *decoder.weights, [](const std::string&) { return false; });
    return model;
  }
  const fs::path config_file = path / "config.json";
  const Json config = read_config(config_file);
  Json text = decoder_config(path, config);
  const LanguageModelSpec& spec =
      find_language_model(text_field(text, config_file.string(), "model_type", ""), config_file.string());
  if (!weights_or_seed(path, fresh_seed)) {
    std::unique_ptr<LanguageModel> model = spec.make(text);
    spec.init(*model, *fresh_seed);
    return model;
  }
  const std::unique_ptr<TensorSource> source = open_weights_folder(path);
  if (is_llava(config)) {  // the other parts' tensors are none of its business
    const UnpaddedVocabulary unpadded(
        *source, integer_field(text, config_file.string(), "vocab_size", 0, 0, INT32_MAX));
    untie_differing_head(text, unpadded);
    std::unique_ptr<LanguageModel> model = spec.make(text);
    load_tensors(model->tensors(), unpadded, [&unpadded](const std::string& name) {
      return find_llava_name("language_model." + name, unpadded);
    });
    return model;
  }
  untie_differing_head(text, *source);
  std::unique_ptr<LanguageModel> model = spec.make(text);
  const std::vector<std::string> leftovers = load_tensors(model->tensors(), *source);
  // A tied head is the embedding; some files store it all the same.
  const bool tied = boolean_field(text, config_file.string(), "tie_word_embeddings", false);
  refuse_leftovers(leftovers, *source,
                   [&](const std::string& name) { return tied && name == "lm_head.weight"; });
  return model;
}

}  // namespace caldera
