// Building a model from what is on disk, and writing it back.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "model/llava.h"
#include "model/weights/safetensors.h"
#include "model/weights/tensor_values.h"

namespace caldera {

// Copies every tensor of `wanted` from the source, names mapped by `name_in_source` (identity if empty).
// Shapes must match, dtypes are converted. Throws CheckpointError listing what is missing (first 5, and how
// many) or mis-shaped (tensor, file, expected shape against got). Returns the source's names that nobody
// wanted.
std::vector<std::string> load_tensors(
    const NamedTensors& wanted, const TensorSource& source,
    const std::function<std::string(const std::string&)>& name_in_source = {});

// A folder with config.json and weights, or with config.json alone where `fresh_seed` is given (then the
// weights are initialised from it). For a GGUF file: `path` itself. A whole LLaVA's folder gives that part of
// it. `image_size` > 0: the tower takes pictures of that size (VisionTower::set_image_size).
std::unique_ptr<VisionTower> load_vision_tower(const std::filesystem::path& path,
                                               const VisionFeatures& features,
                                               std::optional<uint64_t> fresh_seed = {},
                                               int64_t image_size = 0);
// The same without its weights, which stay as the allocator left them: to ask it about its pictures.
std::unique_ptr<VisionTower> make_vision_tower(const std::filesystem::path& path,
                                               const VisionFeatures& features, int64_t image_size = 0);
std::unique_ptr<LanguageModel> load_language_model(const std::filesystem::path& path,
                                                   std::optional<uint64_t> fresh_seed = {});

// Everything needed to build a model anew: where its parts come from and what was trained on top. A step's
// checkpoint stores this (in caldera.json, "build") with its own model.safetensors as the last overlay.
struct BuildSpec {
  std::string vision_tower, language_model;  // as load_vision_tower and load_language_model take them
  std::string mm_projector_type = "mlp2x_gelu";
  VisionFeatures features;
  int64_t image_size = 0;  // of the pictures, in pixels; 0: the tower's own
  uint64_t seed = 0;       // of whatever is fresh: the projector, and parts that have no weights
  // Weights files or folders (classic names) laid over in this order; each gives those tensors of the named
  // components that it holds ("projector", "language_model", "vision_tower"). A vocabulary padded on export
  // is cut back.
  struct Overlay {
    std::string path;
    std::vector<std::string> components;
  };
  std::vector<Overlay> overlays;
  std::optional<LoraConfig> lora;  // a fresh adapter on the decoder's linear layers, drawn from the seed
};
Json to_json(const BuildSpec& spec);
BuildSpec build_spec_from_json(const Json& json, const std::string& where);
// Float32 on CPU. An overlay that holds any tensor of the projector must hold all of them and no other.
std::unique_ptr<LlavaModel> build_llava(const BuildSpec& spec);
// The parts ("vision_tower", "projector", "language_model") that begin at random: no weights in their folder,
// and no overlay brings them.
std::vector<std::string> random_parts(const BuildSpec& spec);
// For a training's start: those parts in one line, "" where there are none. A part that stays as random as it
// began is refused: throws ConfigError for one that is neither among `trainable` nor in `allowed` (the
// recipe's model.random_parts).
std::string check_random_parts(const BuildSpec& spec, const std::vector<std::string>& trainable,
                               const std::vector<std::string>& allowed);

// What `--model DIR` means: a run's output folder (its last stage's final/), a stage's folder (final/, else
// the newest checkpoint), a step's checkpoint, an HF folder, or one with llama.cpp's two files
// (gguf_llava.h). Returns the folder that holds them, config.json or, of a step's checkpoint, caldera.json. Throws CheckpointError saying what it looked for.
std::filesystem::path resolve_model_folder(const std::filesystem::path& dir);

// caldera.json beside the weights: what HF's config.json has no place for.
struct ModelCard {
  std::string conversation_template;  // "" where unknown
  std::string image_aspect_ratio = "square";
  int64_t vocab_size = 0;  // rows of the vocabulary in training; those beyond it only pad the file (0: all)
  Json provenance;         // base weights, data, stage, step, recipe: for people
};

// What a resolved model folder says of itself: caldera.json, else the original LLaVA's config.json, else
// nothing.
ModelCard read_model_card(const std::filesystem::path& folder);
// The pictures that a resolved model folder takes, without reading its weights; nothing where it has no tower
// or the tower's folder is not here.
std::optional<ImageSpec> read_image_spec(const std::filesystem::path& folder);

Json to_json(const ModelCard& card);
ModelCard model_card_from_json(const Json& json, const std::string& where);

struct LoadedModel {
  std::unique_ptr<LlavaModel> model;
  ModelCard card;
  std::filesystem::path folder;  // where the tokenizer is too
};

// Loads an HF LlavaForConditionalGeneration folder (any release's names), one of ours with a tower that HF
// cannot hold, one of the original LLaVA's (llava_config.h), llama.cpp's two GGUF files, or a step's
// checkpoint. Float32 on CPU; call model->to() afterwards. An adapter's folder (see adapters.h) gives its
// base with the adapter merged: the base is `model_base`, else what it names. The original LLaVA's stage 1
// (mm_projector.bin) goes onto the decoder `model_base`.
LoadedModel load_llava(const std::filesystem::path& dir, const std::filesystem::path& model_base = {});

// Writes an HF folder's config.json, weights (classic names), processor_config.json,
// preprocessor_config.json, generation_config.json, caldera.json and a README.md that says what the model was
// trained on and how, into an existing folder. Tokenizer files
// and the chat template are the caller's (data/ owns them). `image_token_id` is the placeholder's id; where
// it lies beyond the vocabulary, embedding and head are padded up to it (rounded up to 64 rows, new rows the
// mean of the others).
struct ExportOptions {
  at::ScalarType dtype = at::kFloat;
  int64_t image_token_id = -1;
  int64_t bos_token_id = 1, eos_token_id = 2, pad_token_id = 0;
  int64_t max_shard_bytes = 5'000'000'000;  // weights above it are sharded, with an index
  TensorValues values;                      // where they are not the model's own
};
void save_hf_llava(LlavaModel& model, const ModelCard& card, const ExportOptions& options,
                   const std::filesystem::path& folder);
// One component as an HF folder of its own: CLIPVisionModel or LlamaForCausalLM.
void save_hf_component(LlavaModel& model, const std::string& part /* "vision_tower" | "language_model" */,
                       at::ScalarType dtype, const std::filesystem::path& folder,
                       int64_t max_shard_bytes = 5'000'000'000, const TensorValues& values = {});

}  // namespace caldera
