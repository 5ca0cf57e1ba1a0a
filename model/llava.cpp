#include "model/llava.h"

#include <algorithm>

#include "base/error.h"
#include "base/strings.h"
#include "base/words.h"
#include "model/ops/ops.h"
#include "model/taps.h"

namespace caldera {

at::Tensor LlavaModel::image_features(const at::Tensor& pixels_ICYX) {
  const NamedTensors tower = vision->tensors();
  const bool trains = std::any_of(tower.begin(), tower.end(),
                                  [](const NamedTensor& tensor) { return tensor.owner->requires_grad(); });
  at::Tensor features_IPD;
  {
    const at::AutoGradMode record(trains && at::GradMode::is_enabled());
    features_IPD = vision->forward(pixels_ICYX);
  }
  tap("vision_tower", features_IPD);
  const at::Tensor projected = projector->forward(features_IPD.flatten(0, 1));
  tap("multi_modal_projector", projected);
  return projected;
}

at::Tensor LlavaModel::embed(const PackedBatch& batch) {
  const at::Tensor& ids = batch.input_ids_T;
  // Checked where the ids lie in host memory; on a device the look-up itself checks.
  if (ids.device().is_cpu() && ids.numel() > 0) {
    const int64_t top = ids.max().item<int64_t>(), low = ids.min().item<int64_t>(),
                  vocab = language->vocab_size();
    CALDERA_CHECK(top < vocab && (low >= 0 || low == kImageTokenIndex), DataError,
                  "token id {} lies outside the model's vocabulary of {} ids: the tokenizer does not belong "
                  "to this model",
                  top < vocab ? low : top, vocab);
  }
  at::Tensor x = language->embed(ids.clamp_min(0));  // placeholders look up row 0 and are replaced
  const int64_t num_rows = batch.image_rows_IP.defined() ? batch.image_rows_IP.numel() : 0;
  if (batch.num_images() == 0) {
    CALDERA_CHECK(num_rows == 0, DataError, "the batch keeps {} rows for image features but holds no image",
                  num_rows);
    return x;
  }
  const at::Tensor projected = image_features(batch.pixels_ICYX);
  CALDERA_CHECK(
      projected.size(0) == num_rows, DataError,
      "the batch keeps {} rows for the features of {} images, but the vision tower makes {} ({} an image)",
      num_rows, batch.num_images(), projected.size(0), projected.size(0) / batch.num_images());
  // Not index_copy_, whose backward keeps the projected rows for their shape.
  return x.index_put_({batch.image_rows_IP}, projected.to(x.scalar_type()));
}

at::Tensor LlavaModel::loss_sum(const PackedBatch& batch, double scale) {
  const at::Tensor hidden =
      language->forward(embed(batch), batch.position_ids_T, batch.cu_seqlens, batch.supervised_K);
  return linear_cross_entropy(hidden, language->head_weight(), batch.targets_K, scale);
}

at::Tensor LlavaModel::nll(const PackedBatch& batch) {
  const at::NoGradGuard no_grad;
  const at::Tensor hidden =
      language->forward(embed(batch), batch.position_ids_T, batch.cu_seqlens, batch.supervised_K);
  return linear_nll(hidden, language->head_weight(), batch.targets_K);
}

at::Tensor LlavaModel::logits(const PackedBatch& batch) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = embed(batch);
  tap("language_model.embeddings", x);
  const at::Tensor hidden = language->forward(x, batch.position_ids_T, batch.cu_seqlens, at::Tensor());
  const at::Tensor logits = at::linear(hidden, language->head_weight()).to(at::kFloat);
  tap("logits", logits);
  return logits;
}

NamedTensors LlavaModel::tensors() {
  NamedTensors list;
  for (const char* component : {"vision_tower", "projector", "language_model"})
    append(list, component_tensors(component));
  return list;
}

NamedTensors LlavaModel::component_tensors(const std::string& component) {
  if (component == "vision_tower") return with_prefix("vision_tower", vision->tensors());
  if (component == "projector") return with_prefix("multi_modal_projector", projector->tensors());
  if (component == "language_model") return with_prefix("language_model", language->tensors());
  throw Error(fmt::format("component \"{}\" is not known{}", component,
                          suggestion(component, {"vision_tower", "projector", "language_model"})));
}

void LlavaModel::to(at::Device device, at::ScalarType dtype) { convert(tensors(), device, dtype); }

}  // namespace caldera
