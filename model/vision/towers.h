// What the towers share, and each one's spec. A new tower is one file and one line here and in registry.cpp.
#pragma once

#include <array>

#include "base/aten.h"
#include "base/json.h"
#include "base/words.h"
#include "model/vision/tower.h"

namespace caldera {

const VisionTowerSpec& clip_spec();
const VisionTowerSpec& siglip_spec();
const VisionTowerSpec& efficientnet_lite_spec();

// The tower's own configuration: a CLIPModel's or SiglipModel's config.json holds it as one part of two.
Json vision_part(const Json& config);

// The tower's defaults with mean, deviation and the kind of resizing that preprocessor_config.json states, if
// it does. The size stays the tower's own.
ImageSpec image_spec_from(const Json& preprocessor, ImageSpec defaults);

// Throws ConfigError unless at least one patch and at most 8192 pixels.
void check_image_size(int64_t image_size, int64_t patch_size);

// Throws DataError unless the pixels are uint8 [I, 3, image_size, image_size].
void check_pixels(const at::Tensor& pixels_ICYX, const ImageSpec& spec);

// (x / 255 - mean) / std of a channel as x * scale + shift.
struct PixelScale {
  std::array<float, 3> scale{}, shift{};
};
PixelScale pixel_scale(const ImageSpec& spec);

// uint8 [I, 3, Y, X] -> (x / 255 - mean) / std, computed in float32, in `dtype`.
at::Tensor normalize_pixels(const at::Tensor& pixels_ICYX, const ImageSpec& spec, at::ScalarType dtype);

// "patch" or HF's "default": true; "cls_patch" or "full": false. Throws ConfigError for anything else.
bool drops_class_token(const VisionFeatures& features);

}  // namespace caldera
