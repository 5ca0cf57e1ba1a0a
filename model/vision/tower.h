// A vision tower: pictures in, patch features out. Each tower is one file that exports a VisionTowerSpec, and
// one line in registry.cpp.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/aten.h"
#include "base/json.h"
#include "base/words.h"
#include "model/module.h"

namespace caldera {

// Which of the tower's features are used; LLaVA's and HF's names.
struct VisionFeatures {
  int64_t vision_feature_layer = -2;  // hidden_states index; -2: output of the last block but one
  std::string vision_feature_select_strategy =
      "patch";  // "patch" (drops CLS; HF's "default") or "cls_patch" ("full")
};

class VisionTower {
 public:
  virtual ~VisionTower() = default;
  // uint8 RGB pixels [I, 3, Y, X] on the tower's device -> features [I, P, D] in the tower's dtype. Scales,
  // normalises and runs the blocks up to the feature layer only.
  virtual at::Tensor forward(const at::Tensor& pixels_ICYX) = 0;
  // As in HF's classic files: "vision_model.embeddings.class_embedding", ...
  virtual NamedTensors tensors() = 0;
  // Takes pictures of another size from now on: position embeddings are interpolated as HF's
  // interpolate_pos_encoding does, once, so that every file written later holds them for that size. Throws
  // ConfigError for a size that the tower cannot take.
  virtual void set_image_size(int64_t image_size) = 0;
  virtual ImageSpec image_spec() const = 0;
  virtual int64_t hidden_size() const = 0;  // D
  virtual bool has_class_token() const { return false; }
  virtual Json config() const = 0;  // what its config.json holds (for CLIP: HF's CLIPVisionConfig)
  virtual const char* id() const = 0;
};

struct VisionTowerSpec {
  const char* id;
  std::vector<std::string> model_types;  // config.json "model_type" values it answers to
  // A tower with undefined (not yet loaded) weights' storage allocated in float32 on CPU. `config` is the
  // tower's config.json, `preprocessor` its preprocessor_config.json (empty object where there is none).
  std::unique_ptr<VisionTower> (*make)(const Json& config, const Json& preprocessor,
                                       const VisionFeatures& features);
  // Fresh weights.
  void (*init)(VisionTower& tower, uint64_t seed);
  // True where HF's LlavaForConditionalGeneration can hold it.
  bool in_hf_llava;
};

std::span<const VisionTowerSpec> vision_towers();
// The spec for a model_type; throws CheckpointError naming the known ones (with a near match).
const VisionTowerSpec& find_vision_tower(const std::string& model_type, const std::string& where);

}  // namespace caldera
