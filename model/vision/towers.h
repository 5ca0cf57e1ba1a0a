// What the towers share, and each one's spec. A new tower is one file and one line here and in registry.cpp.
#pragma once
#include <ATen/ATen.h>

#include "base/json.h"
#include "base/words.h"
#include "model/vision/tower.h"

namespace caldera {

const VisionTowerSpec& clip_spec();
const VisionTowerSpec& efficientnet_lite_spec();

// Mean and deviation of preprocessor_config.json (CLIP's where it has none); the size is the tower's own.
ImageSpec image_spec_from(const Json& preprocessor, int64_t image_size);

// Throws DataError unless the pixels are uint8 [I, 3, image_size, image_size].
void check_pixels(const at::Tensor& pixels_ICYX, const ImageSpec& spec);

// uint8 [I, 3, Y, X] -> (x / 255 - mean) / std, computed in float32, in `dtype`.
at::Tensor normalize_pixels(const at::Tensor& pixels_ICYX, const ImageSpec& spec, at::ScalarType dtype);

// "patch" or HF's "default": true; "cls_patch" or "full": false. Throws ConfigError for anything else.
bool drops_class_token(const VisionFeatures& features);

}  // namespace caldera
