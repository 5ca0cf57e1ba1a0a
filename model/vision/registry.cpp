#include <ATen/Parallel.h>

#include <cmath>
#include <string_view>

#include "base/aten.h"
#include "base/error.h"
#include "base/log.h"
#include "base/strings.h"
#include "model/ops/simd.h"
#include "model/vision/towers.h"
#include "model/weights/json_fields.h"

namespace caldera {
namespace {

CALDERA_INLINE void scale_plane(const uint8_t* __restrict in, float* __restrict out, int64_t count, float scale,
                                float shift) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(in[i]) * scale + shift;
}

}  // namespace

std::span<const VisionTowerSpec> vision_towers() {
  static const std::vector<VisionTowerSpec> towers = {clip_spec(), siglip_spec(), efficientnet_lite_spec()};
  return towers;
}

const VisionTowerSpec& find_vision_tower(const std::string& model_type, const std::string& where) {
  std::vector<std::string> known;
  for (const VisionTowerSpec& spec : vision_towers()) {
    for (const std::string& type : spec.model_types) {
      if (type == model_type) return spec;
      known.push_back(type);
    }
  }
  throw CheckpointError(fmt::format("{}: unknown vision tower model_type \"{}\"{}", where, model_type,
                                    suggestion(model_type, known)));
}

Json vision_part(const Json& config) {
  const auto part = config.find("vision_config");
  return part != config.end() && part->is_object() ? Json(*part) : config;
}

ImageSpec image_spec_from(const Json& preprocessor, ImageSpec spec) {
  const std::string where = "preprocessor_config.json";
  const auto read = [&](const char* key, std::array<float, 3>& values) {
    if (!preprocessor.contains(key)) return;
    const Json& list = preprocessor[key];
    CALDERA_CHECK(list.is_array() && list.size() == 3, CheckpointError,
                  "{}: {}: expected three numbers, got {}", where, key, json_line(list));
    for (size_t i = 0; i < 3; ++i) {
      CALDERA_CHECK(list[i].is_number(), CheckpointError, "{}: {}: expected three numbers, got {}", where,
                    key, json_line(list));
      values[i] = list[i].get<float>();
    }
  };
  read("image_mean", spec.image_mean);
  read("image_std", spec.image_std);
  const auto is_off = [&](const char* key) { return preprocessor.value(key, Json()) == false; };
  if (is_off("do_normalize")) {
    spec.image_mean = {0, 0, 0};
    spec.image_std = {1, 1, 1};
  }
  // Pixels of 0 to 255 times the factor, less the mean, over the deviation: as with 1/255 and other numbers.
  const Json factor = is_off("do_rescale") ? Json(1) : preprocessor.value("rescale_factor", Json());
  CALDERA_CHECK(factor.is_null() || (factor.is_number() && factor.get<double>() > 0), CheckpointError,
                "{}: rescale_factor: expected a positive number, got {}", where, json_line(factor));
  if (const double ratio = 255 * (factor.is_null() ? 1.0 / 255 : factor.get<double>()); std::abs(ratio - 1) > 1e-6) {
    for (float& mean : spec.image_mean) mean = static_cast<float>(mean / ratio);
    for (float& deviation : spec.image_std) deviation = static_cast<float>(deviation / ratio);
  }
  // CLIP's "size" is a shortest edge, as an object or (older files) a number; SigLIP's a height and a width.
  const auto size = preprocessor.find("size");
  if (size != preprocessor.end() && (size->is_number() || size->contains("shortest_edge")))
    spec.keeps_aspect = true;
  if (size != preprocessor.end() && size->contains("height")) spec.keeps_aspect = false;
  const auto side = [&](const char* key) {
    const Json given = preprocessor.value(key, Json());
    for (const char* part : {"shortest_edge", "height"})
      if (given.is_object() && given.contains(part)) return Json(given[part]);
    return given.is_number() ? given : Json();
  };
  for (const char* key : {"do_resize", "do_center_crop"})
    CALDERA_CHECK(!is_off(key) || (!spec.keeps_aspect && std::string_view(key) == "do_center_crop"), CheckpointError,
                  "{}: {}: false: pictures are always resized and cropped to the tower's size here; set it to true if the "
                  "model was trained so",
                  where, key);
  CALDERA_CHECK(!spec.keeps_aspect || side("size").is_null() || side("crop_size").is_null() ||
                    side("size") == side("crop_size"),
                CheckpointError, "{}: size {} and crop_size {}: a crop of larger pictures is not made here", where,
                json_line(side("size")), json_line(side("crop_size")));
  const auto resample = preprocessor.find("resample");
  if (resample != preprocessor.end() && *resample != 3)
    log_warning(
        "{}: resample {}: pictures are resized bicubically here (3); the numbers will differ a little", where,
        json_line(*resample));
  for (const float deviation : spec.image_std)
    CALDERA_CHECK(deviation > 0, CheckpointError, "{}: image_std: expected positive numbers, got {}", where,
                  deviation);
  return spec;
}

void check_image_size(int64_t image_size, int64_t patch_size) {
  CALDERA_CHECK(image_size >= patch_size && image_size <= 8192, ConfigError,
                "image_size: expected a size from {} (the tower's patch) to 8192 pixels, got {}", patch_size,
                image_size);
}

void check_pixels(const at::Tensor& pixels_ICYX, const ImageSpec& spec) {
  const int64_t size = spec.image_size;
  CALDERA_CHECK(pixels_ICYX.dim() == 4 && pixels_ICYX.scalar_type() == at::kByte &&
                    pixels_ICYX.size(1) == 3 && pixels_ICYX.size(2) == size && pixels_ICYX.size(3) == size,
                DataError,
                "the vision tower takes uint8 pixels of shape [images, 3, {}, {}], got {} of shape [{}]",
                size, size, c10::toString(pixels_ICYX.scalar_type()), fmt::join(pixels_ICYX.sizes(), ", "));
}

PixelScale pixel_scale(const ImageSpec& spec) {
  PixelScale by;
  for (size_t i = 0; i < 3; ++i) {
    by.scale[i] = 1.0f / (255.0f * spec.image_std[i]);
    by.shift[i] = -spec.image_mean[i] / spec.image_std[i];
  }
  return by;
}

at::Tensor normalize_pixels(const at::Tensor& pixels_ICYX, const ImageSpec& spec, at::ScalarType dtype) {
  const PixelScale by = pixel_scale(spec);
  if (pixels_ICYX.is_cpu()) {
    const at::Tensor in_ICYX = pixels_ICYX.contiguous();
    at::Tensor out_ICYX = at::empty(in_ICYX.sizes(), at::kFloat);
    const int64_t plane = in_ICYX.size(2) * in_ICYX.size(3);
    const auto* in = in_ICYX.const_data_ptr<uint8_t>();
    auto* out = out_ICYX.data_ptr<float>();
    at::parallel_for(0, in_ICYX.size(0) * 3, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto c = static_cast<size_t>(i % 3);
        simd::run<scale_plane>(in + i * plane, out + i * plane, plane, by.scale[c], by.shift[c]);
      }
    });
    return out_ICYX.to(dtype);
  }
  const auto per_channel = [&](const std::array<float, 3>& values) {
    return at::tensor(at::ArrayRef<float>(values), at::kFloat).view({1, 3, 1, 1}).to(pixels_ICYX.device());
  };
  return pixels_ICYX.to(at::kFloat).mul_(per_channel(by.scale)).add_(per_channel(by.shift)).to(dtype);
}

bool drops_class_token(const VisionFeatures& features) {
  const std::string& strategy = features.vision_feature_select_strategy;
  if (strategy == "patch" || strategy == "default") return true;
  if (strategy == "cls_patch" || strategy == "full") return false;
  throw ConfigError(fmt::format("vision_feature_select_strategy: unknown \"{}\"{}", strategy,
                                suggestion(strategy, {"patch", "cls_patch"})));
}

}  // namespace caldera
