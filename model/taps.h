// Named activations on their way through the model, so that two implementations can be compared layer by
// layer. Nothing happens unless a TapRecorder lives in the calling thread.
//
// Names, in the order of computation (I images, N tokens of an image with the class token, P without, T
// tokens, V vocabulary):
//   vision_tower.embeddings    [I, N, D]  what the first block sees (CLIP: after pre_layrnorm);
//   EfficientNet-Lite: the stem's [I, C, Y, X] vision_tower.layers.K      [I, N, D]  behind block K, up to
//   the feature layer;              EfficientNet-Lite: block K's [I, C, Y, X] vision_tower               [I,
//   P, D]  the features that the projector takes multi_modal_projector      [I P, D]
//   language_model.embeddings  [T, D]     with the image features in their places
//   language_model.layers.K    [T, D]     behind block K
//   language_model.norm        [T, D]
//   logits                     [T, V]
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "base/aten.h"

namespace caldera {

// Hands every activation of this thread's forward passes to `record` while it lives. One at a time.
class TapRecorder {
 public:
  using Record = std::function<void(const std::string& name, const at::Tensor& value)>;
  explicit TapRecorder(Record record);
  ~TapRecorder();
  TapRecorder(const TapRecorder&) = delete;
  TapRecorder& operator=(const TapRecorder&) = delete;
};

void tap(const char* name, const at::Tensor& value);
// "PREFIX.INDEX".
void tap(const char* prefix, size_t index, const at::Tensor& value);

}  // namespace caldera
