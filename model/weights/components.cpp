// One component from a folder or file of its own.
#include "base/error.h"
#include "base/strings.h"
#include "model/weights/gguf_weights.h"
#include "model/weights/json_fields.h"
#include "model/weights/load.h"
#include "model/weights/names.h"

namespace caldera {
namespace {

std::string shape_text(at::IntArrayRef shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

// Whether there are weights to read; without them there must be a seed to make them from.
bool weights_or_seed(const fs::path& path, std::optional<uint64_t> fresh_seed) {
  if (has_weights(path)) return true;
  if (!fresh_seed) open_weights_folder(path);  // throws, naming what it looked for
  return false;
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
    CALDERA_CHECK(value.sizes() == at::IntArrayRef(shape), CheckpointError,
                  "{}: {}: expected shape {}, got {}", source.where(name), name, shape_text(value.sizes()),
                  shape_text(shape));
    const at::Tensor stored = source.read(name);
    CALDERA_CHECK(stored.is_floating_point(), CheckpointError,
                  "{}: {}: expected floating-point weights, got {}; is this a quantised checkpoint?",
                  source.where(name), name, c10::toString(stored.scalar_type()));
    value.copy_(stored);
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

std::unique_ptr<VisionTower> load_vision_tower(const fs::path& path, const VisionFeatures& features,
                                               std::optional<uint64_t> fresh_seed) {
  const fs::path config_file = path / "config.json";
  const Json config = read_config(config_file);
  const VisionTowerSpec& spec =
      find_vision_tower(text_field(config, config_file.string(), "model_type", ""), config_file.string());
  std::unique_ptr<VisionTower> tower = spec.make(config, read_preprocessor_config(path), features);
  if (!weights_or_seed(path, fresh_seed)) {
    spec.init(*tower, *fresh_seed);
    return tower;
  }
  const std::unique_ptr<TensorSource> source = open_weights_folder(path);
  // transformers 5 saves CLIPVisionModel without its "vision_model." prefix; a CLIPModel holds a text tower
  // besides.
  const std::string prefix = "vision_model.";
  const bool stripped =
      !source->has(prefix + "embeddings.class_embedding") && source->has("embeddings.class_embedding");
  const std::vector<std::string> leftovers =
      load_tensors(tower->tensors(), *source, [&](const std::string& name) {
        return stripped && name.starts_with(prefix) ? name.substr(prefix.size()) : name;
      });
  refuse_leftovers(leftovers, *source, [](const std::string& name) {
    return name.starts_with("text_model.") || name == "logit_scale" || name == "text_projection.weight" ||
           name == "visual_projection.weight";
  });
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
  const LanguageModelSpec& spec =
      find_language_model(text_field(config, config_file.string(), "model_type", ""), config_file.string());
  std::unique_ptr<LanguageModel> model = spec.make(config);
  if (!weights_or_seed(path, fresh_seed)) {
    spec.init(*model, *fresh_seed);
    return model;
  }
  const std::unique_ptr<TensorSource> source = open_weights_folder(path);
  const std::vector<std::string> leftovers = load_tensors(model->tensors(), *source);
  // A tied head is the embedding; some files store it all the same.
  const bool tied = boolean_field(config, config_file.string(), "tie_word_embeddings", false);
  refuse_leftovers(leftovers, *source,
                   [&](const std::string& name) { return tied && name == "lm_head.weight"; });
  return model;
}

}  // namespace caldera
