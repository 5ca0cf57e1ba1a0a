// Keys and names as in gguf_export_mmproj.cpp.
#include "model/weights/gguf_llava.h"

#include "base/error.h"
#include "base/gguf.h"
#include "base/strings.h"
#include "base/words.h"
#include "model/weights/gguf_config.h"
#include "model/weights/gguf_names.h"
#include "model/weights/gguf_weights.h"
#include "model/weights/names.h"

namespace caldera {
namespace {

constexpr const char* kProjectorPrefix = "multi_modal_projector.";

class Mmproj {
 public:
  explicit Mmproj(const fs::path& path) : file_(std::make_shared<GgufFile>(path)), where_(path.string()) {
    const auto expect = [this](const char* key, const char* expected) {
      const auto got = file_->get<std::string>(key);
      CALDERA_CHECK(got == expected, CheckpointError, "{}: {}: expected {}, got {}", where_, key, expected,
                    got);
    };
    refuse_gguf_part(*file_);
    expect("general.architecture", "clip");
    expect("clip.projector_type", "mlp");
    for (const GgufTensor& tensor : file_->tensors()) {
      has_class_token_ |= tensor.name == "v.class_embd";
      // llama.cpp's first converters, whose LLaVA-1.5 files are the most common, named an MLP's two layers the other
      // way round: told by their shapes, as llama.cpp does.
      if (tensor.name == "v.blk.0.ffn_up.weight")
        swaps_mlp_ = tensor.shape[0] == size("embedding_length") && tensor.shape[0] != size("feed_forward_length");
    }
  }

  std::unique_ptr<VisionTower> make_tower() const {
    const char* model_type = has_class_token_ ? "clip_vision_model" : "siglip_vision_model";
    return find_vision_tower(model_type, where_).make(config(model_type), preprocessor(), features());
  }

  VisionFeatures features() const {
    // llama.cpp's rule: the deepest layer named; where none is, all blocks but the last run.
    const int64_t blocks = size("block_count");
    int64_t layer = blocks - 1;
    if (file_->has("clip.vision.feature_layer")) {
      const auto layers = file_->get<std::vector<int64_t>>("clip.vision.feature_layer");
      CALDERA_CHECK(layers.size() == 1 && layers[0] >= 0 && layers[0] <= blocks, CheckpointError,
                    "{}: clip.vision.feature_layer: expected one of 0 to {}, got [{}]", where_, blocks,
                    fmt::join(layers, ", "));
      layer = layers[0];
    }
    return {.vision_feature_layer = layer};
  }

  // Tensors under the names of an HF LLaVA's tower and projector.
  std::unique_ptr<TensorSource> tensors() const {
    return open_gguf_tensors(file_, [swaps = swaps_mlp_](const std::string& name) {
      const std::string projector = hf_projector_name(name);
      if (!projector.empty()) return kProjectorPrefix + projector;
      if (swaps && name.find(".ffn_up.") != std::string::npos)
        return hf_tower_name(replace_all(name, ".ffn_up.", ".ffn_down."));
      return hf_tower_name(swaps ? replace_all(name, ".ffn_down.", ".ffn_up.") : name);
    });
  }

  std::string aspect_ratio() const {
    return file_->get_or<std::string>("clip.vision.image_aspect_ratio", kAspectPad) == kAspectSquare
               ? kAspectSquare
               : kAspectPad;
  }

 private:
  int64_t size(const std::string& key) const {
    const auto value = file_->get<int64_t>("clip.vision." + key);
    CALDERA_CHECK(value > 0 && value <= 1 << 20, CheckpointError,
                  "{}: clip.vision.{}: expected a size, got {}", where_, key, value);
    return value;
  }
  Json config(const char* model_type) const {
    const bool gelu = file_->get_or<bool>("clip.use_gelu", false);
    CALDERA_CHECK(!file_->get_or<bool>("clip.use_silu", false), CheckpointError,
                  "{}: clip.use_silu: expected GELU, which CLIP and SigLIP towers have", where_);
    return {{"model_type", model_type},
            {"hidden_size", size("embedding_length")},
            {"intermediate_size", size("feed_forward_length")},
            {"num_hidden_layers", size("block_count")},
            {"num_attention_heads", size("attention.head_count")},
            {"image_size", size("image_size")},
            {"patch_size", size("patch_size")},
            {"layer_norm_eps", file_->get<double>("clip.vision.attention.layer_norm_epsilon")},
            {"hidden_act",
             file_->get_or<std::string>("caldera.hidden_act", gelu ? "gelu_pytorch_tanh" : "quick_gelu")},
            {"vision_use_head", false}};
  }
  Json preprocessor() const {
    return {{"image_mean", file_->get<std::vector<double>>("clip.vision.image_mean")},
            {"image_std", file_->get<std::vector<double>>("clip.vision.image_std")}};
  }

  std::shared_ptr<GgufFile> file_;
  std::string where_;
  bool has_class_token_ = false, swaps_mlp_ = false;
};

// The tower's tensors that the file is to give. Its last norm, for which neither llama.cpp nor LLaVA has a
// use, becomes the identity where the file lacks it.
NamedTensors tensors_to_load(VisionTower& tower, const TensorSource& source) {
  NamedTensors wanted = tower.tensors();
  std::erase_if(wanted, [&source](const NamedTensor& named) {
    if (named.name.find(".post_layernorm.") == std::string::npos || source.has(named.name)) return false;
    named.value().fill_(named.name.ends_with("weight") ? 1.0 : 0.0);
    return true;
  });
  return wanted;
}

}  // namespace

std::optional<GgufLlavaFiles> find_gguf_llava(const fs::path& folder) {
  if (!fs::is_directory(folder) || fs::exists(folder / "config.json")) return {};
  std::vector<fs::path> decoders, mmprojs;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".gguf") continue;
    const bool is_mmproj = entry.path().filename().string().starts_with("mmproj");
    (is_mmproj ? mmprojs : decoders).push_back(entry.path());
  }
  if (mmprojs.empty()) return {};
  CALDERA_CHECK(mmprojs.size() == 1 && decoders.size() == 1, CheckpointError,
                "{}: expected one decoder's .gguf and one mmproj*.gguf, got {} and {}; keep one pair a "
                "folder, parts of a split model "
                "joined (llama-gguf-split --merge)",
                folder.string(), decoders.size(), mmprojs.size());
  return GgufLlavaFiles{decoders[0], mmprojs[0]};
}

std::unique_ptr<VisionTower> make_gguf_vision_tower(const fs::path& mmproj) {
  return Mmproj(mmproj).make_tower();
}

std::unique_ptr<LlavaModel> load_gguf_llava(const GgufLlavaFiles& files) {
  const Mmproj mmproj(files.mmproj);
  auto model = std::make_unique<LlavaModel>();
  model->features = mmproj.features();
  model->vision = mmproj.make_tower();
  model->language = load_language_model(files.decoder);
  model->mm_projector_type = "mlp2x_gelu";
  model->projector =
      make_projector(model->mm_projector_type, model->vision->hidden_size(), model->language->hidden_size());
  const std::unique_ptr<TensorSource> source = mmproj.tensors();
  const at::NoGradGuard no_grad;
  const std::vector<std::string> rest = load_tensors(tensors_to_load(*model->vision, *source), *source);
  load_tensors(model->projector->tensors(), *source,
               [](const std::string& name) { return kProjectorPrefix + name; });
  refuse_leftovers(rest, *source, [](const std::string& name) { return name.starts_with(kProjectorPrefix); });
  return model;
}

ModelCard read_gguf_card(const GgufLlavaFiles& files) {
  const GgufFile decoder(files.decoder);
  constexpr const char* kCard = "caldera.card";
  if (decoder.has(kCard)) {
    const std::string where = files.decoder.string() + ": " + kCard;
    return model_card_from_json(parse_json(decoder.get<std::string>(kCard), where), where);
  }
  ModelCard card;
  card.image_aspect_ratio = Mmproj(files.mmproj).aspect_ratio();
  return card;
}

}  // namespace caldera
