// The whole model: tower, projector, decoder.
#pragma once

#include <memory>
#include <string>

#include "base/aten.h"
#include "base/batch.h"
#include "base/json.h"
#include "model/language/language_model.h"
#include "model/projector/projector.h"
#include "model/vision/tower.h"

namespace caldera {

class LlavaModel {
 public:
  std::unique_ptr<VisionTower> vision;
  std::unique_ptr<Projector> projector;
  std::unique_ptr<LanguageModel> language;
  VisionFeatures features;
  std::string mm_projector_type = "mlp2x_gelu";

  // Projected features of uint8 pixels [I, 3, Y, X] -> [I * P, D]. No graph through a tower that does not train.
  at::Tensor image_features(const at::Tensor& pixels_ICYX);
  // Embeddings of the packed row, image features put in their rows by one index_copy -> [T, D].
  at::Tensor embed(const PackedBatch& batch);
  // `scale` times the sum of the negative log likelihood over the batch's supervised positions, a float32 scalar in nats.
  at::Tensor loss_sum(const PackedBatch& batch, double scale = 1);
  // The same per supervised position, float32 [K], without gradients.
  at::Tensor nll(const PackedBatch& batch);
  // Logits of every row, [T, V] float32 (for parity tests and debugging; training never makes them).
  at::Tensor logits(const PackedBatch& batch);

  // All tensors under HF's classic LLaVA names: "vision_tower.", "multi_modal_projector." and "language_model." before the
  // components' own ("language_model.model.embed_tokens.weight"). This order is the order of every file that lists them.
  NamedTensors tensors();
  // One component of them, same names: "vision_tower", "projector" or "language_model".
  NamedTensors component_tensors(const std::string& component);
  ImageSpec image_spec() const { return vision->image_spec(); }
  at::Device device() const { return language->head_weight().device(); }
  at::ScalarType dtype() const { return language->head_weight().scalar_type(); }
  void to(at::Device device, at::ScalarType dtype);
};

}  // namespace caldera
