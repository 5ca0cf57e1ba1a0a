// The towers against the reference's own numbers; goldens by scripts/make_goldens_vision.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.h"
#include "model/vision/tower.h"
#include "model/vision/vit.h"
#include "model/weights/load.h"
#include "tests/aten.h"
#include "tests/model/vision_golden.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;


Json clip_config(const char* act = "quick_gelu") {
  return {{"model_type", "clip_vision_model"},
          {"hidden_size", 24},
          {"intermediate_size", 40},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 3},
          {"image_size", 30},
          {"patch_size", 7},
          {"hidden_act", act}};
}

std::unique_ptr<VisionTower> golden_clip(const TensorSource& golden, const VisionFeatures& features,
                                         const char* act = "quick_gelu") {
  return golden_tower(clip_config(act), golden, features);
}

TEST(Clip, HiddenStatesAreTransformers) {
  const auto golden = open_safetensors(kGolden / "vision_clip.safetensors");
  const at::Tensor pixels = golden->read("pixels");
  for (const char* act : {"quick_gelu", "gelu"}) {
    for (int64_t layer = 0; layer <= 3; ++layer) {
      const at::Tensor expected = golden->read(fmt::format("{}.hidden.{}", act, layer));
      for (const int64_t index : {layer, layer - 4}) {  // from either end
        const at::NoGradGuard no_grad;
        const at::Tensor all = golden_clip(*golden, {index, "cls_patch"}, act)->forward(pixels);
        EXPECT_LT(max_difference(all, expected), 1e-5) << act << " hidden_states[" << index << "]";
        const at::Tensor patches = golden_clip(*golden, {index, "patch"}, act)->forward(pixels);
        EXPECT_LT(max_difference(patches, expected.narrow(1, 1, 16)), 1e-5);
      }
    }
  }
}

TEST(Clip, GradientsAreTransformers) {
  const auto golden = open_safetensors(kGolden / "vision_clip.safetensors");
  const auto tower = golden_clip(*golden, {});
  NamedTensors tensors = tower->tensors();
  set_trainable(tensors, true);
  (tower->forward(golden->read("pixels")) * golden->read("cotangent")).sum().backward();
  int compared = 0;
  for (const NamedTensor& named : tensors) {
    const std::string name = "grad." + named.name;
    if (golden->has(name)) {
      const at::Tensor expected = golden->read(name);
      EXPECT_LT(max_difference(named.grad(), expected), 1e-5 * (1 + expected.abs().max().item<double>()))
          << named.name;
      ++compared;
    }
    // Blocks behind the feature layer and the last norm take no part.
    if (named.name.find("layers.2.") != std::string::npos || named.name.find("post_") != std::string::npos) {
      EXPECT_FALSE(named.grad().defined()) << named.name;
    }
  }
  EXPECT_EQ(compared, 21);
}

TEST(Clip, TheGraphChangesNoNumber) {
  const auto golden = open_safetensors(kGolden / "vision_clip.safetensors");
  for (const char* act : {"quick_gelu", "gelu"}) {
    const auto tower = golden_clip(*golden, {}, act);
    const at::Tensor lean = tower->forward(golden->read("pixels"));  // in place: nothing requires a gradient
    set_trainable(tower->tensors(), true);
    EXPECT_TRUE(at::equal(lean, tower->forward(golden->read("pixels")).detach()));
  }
}

TEST(Clip, DescribesItself) {
  const auto tower = make_tower(clip_config());
  EXPECT_EQ(tower->image_spec().num_image_tokens, 16);
  EXPECT_EQ(tower->image_spec().image_size, 30);
  EXPECT_EQ(make_tower(clip_config(), {-2, "full"})->image_spec().num_image_tokens, 17);
  EXPECT_EQ(make_tower(tower->config())->config(), tower->config());
  const Json inside = {
      {"model_type", "clip"}, {"vision_config", clip_config()}, {"text_config", Json::object()}};
  EXPECT_EQ(make_tower(inside)->config(), tower->config());
}

TEST(Clip, BfloatStaysNear) {
  const auto golden = open_safetensors(kGolden / "vision_clip.safetensors");
  const auto tower = golden_clip(*golden, {});
  convert(tower->tensors(), at::kCPU, at::kBFloat16);
  const at::Tensor features = tower->forward(golden->read("pixels"));
  EXPECT_EQ(features.scalar_type(), at::kBFloat16);
  const at::Tensor expected = golden->read("quick_gelu.hidden.2").narrow(1, 1, 16);
  EXPECT_LT((features.to(at::kFloat) - expected).norm().item<float>(), 0.02f * expected.norm().item<float>());
}

TEST(Clip, FreshWeightsFollowTheRules) {
  Json config = clip_config();
  config["hidden_size"] = 192;
  config["intermediate_size"] = 384;
  const auto tower = make_tower(config);
  find_vision_tower("clip_vision_model", "test").init(*tower, 7);
  std::map<std::string, at::Tensor> values;
  for (const NamedTensor& named : tower->tensors()) values[named.name.substr(13)] = named.value();
  const auto deviation = [&](const char* name) { return values.at(name).std().item<double>(); };
  const double width = 1 / std::sqrt(192.0), depth = 1 / std::sqrt(6.0);
  EXPECT_NEAR(deviation("embeddings.patch_embedding.weight"), 0.02, 0.001);
  EXPECT_NEAR(deviation("encoder.layers.0.self_attn.k_proj.weight"), width * depth, 0.001);
  EXPECT_NEAR(deviation("encoder.layers.2.self_attn.out_proj.weight"), width, 0.002);
  EXPECT_NEAR(deviation("encoder.layers.1.mlp.fc1.weight"), 1 / std::sqrt(384.0), 0.002);
  EXPECT_NEAR(deviation("encoder.layers.1.mlp.fc2.weight"), width * depth, 0.001);
  EXPECT_TRUE((values.at("encoder.layers.1.layer_norm2.weight") == 1).all().item<bool>());
  EXPECT_TRUE((values.at("encoder.layers.1.self_attn.q_proj.bias") == 0).all().item<bool>());
}

// Neighbours are alike, and the further apart two patches are along one axis, the less so.
TEST(Clip, FreshPositionsSayWhere) {
  const int64_t side = 6, D = 64;
  const at::Tensor positions = at::full({1 + side * side, D}, 9.0);
  fill_sincos_positions_(positions, 1);
  EXPECT_TRUE((positions[0] == 0).all().item<bool>());
  const at::Tensor grid = positions.slice(0, 1).reshape({side, side, D});
  EXPECT_NEAR(grid.square().sum(2).std().item<double>(), 0, 1e-5);  // all of one length, sqrt(D / 2)
  const auto likeness = [&](int64_t y, int64_t x) { return (grid[0][0] * grid[y][x]).sum().item<double>(); };
  for (int64_t i = 1; i < 4; ++i) {
    EXPECT_LT(likeness(0, i), likeness(0, i - 1));
    EXPECT_NEAR(likeness(0, i), likeness(i, 0), 1e-4);
  }
}

TEST(Clip, RefusesWithReason) {
  const auto message = [](const Json& change, const VisionFeatures& features = {}) -> std::string {
    Json config = clip_config();
    config.update(change);
    try {
      make_tower(config, features);
    } catch (const Error& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message(Json::object()), "accepted");
  EXPECT_THAT(message({{"hidden_act", "relu"}}),
              HasSubstr("hidden_act: expected quick_gelu, gelu or gelu_pytorch_tanh, got relu"));
  EXPECT_THAT(message({{"hidden_size", "24"}}), HasSubstr("hidden_size: expected an integer"));
  EXPECT_THAT(message({{"hidden_size", 25}}), HasSubstr("no multiple of num_attention_heads"));
  EXPECT_THAT(message({{"num_hidden_layers", 1000000}}), HasSubstr("from 1 to 1024"));
  EXPECT_THAT(message({{"patch_size", 31}}), HasSubstr("patch_size"));
  EXPECT_THAT(message({{"num_channels", 1}}), HasSubstr("num_channels"));
  EXPECT_THAT(message(Json::object(), {4, "patch"}), HasSubstr("hidden states -4 to 3, got 4"));
  EXPECT_THAT(message(Json::object(), {-5, "patch"}), HasSubstr("got -5"));
  EXPECT_THAT(message(Json::object(), {-2, "pach"}), HasSubstr("did you mean \"patch\""));
  EXPECT_THROW(find_vision_tower("clip_vison_model", "x/config.json"), CheckpointError);
  const auto tower = make_tower(clip_config());
  EXPECT_THROW(tower->forward(at::zeros({1, 3, 30, 31}, at::kByte)), DataError);
  EXPECT_THROW(tower->forward(at::zeros({1, 3, 30, 30}, at::kFloat)), DataError);
}

TEST(ImageSpec, ComesFromThePreprocessor) {
  const VisionTowerSpec& spec = find_vision_tower("clip_vision_model", "test");
  const auto with = [&](const Json& preprocessor) {
    return spec.make(clip_config(), preprocessor, {})->image_spec();
  };
  EXPECT_EQ(with(Json::object()).image_mean[0], 0.48145466f);
  EXPECT_EQ(with({{"image_mean", {0.1, 0.2, 0.3}}}).image_mean[2], 0.3f);
  EXPECT_THROW(with({{"image_mean", {0.1, 0.2}}}), CheckpointError);
  EXPECT_THROW(with({{"image_std", {0.1, "x", 0.3}}}), CheckpointError);
  EXPECT_THROW(with({{"image_std", {0.1, 0, 0.3}}}), CheckpointError);
}

// The numbers that make_goldens_vision.py's formula() gives, so that no weights need to be stored.
at::Tensor formula(uint64_t index, at::IntArrayRef shape) {
  at::Tensor values = at::empty(shape);
  float* out = values.mutable_data_ptr<float>();
  for (uint64_t i = 0; i < static_cast<uint64_t>(values.numel()); ++i) {
    uint64_t x = i + (index << 32);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    x = x ^ (x >> 31);
    out[i] = static_cast<float>(x >> 40) / static_cast<float>(1 << 24);
  }
  return values;
}

const Json kLite0 = {{"model_type", "efficientnet_lite"}, {"image_size", 224}};
const Json kLitePreprocessor = {{"image_mean", {127.0 / 255, 127.0 / 255, 127.0 / 255}},
                                {"image_std", {128.0 / 255, 128.0 / 255, 128.0 / 255}}};

TEST(EfficientNetLite, FeaturesAreThePackages) {
  const auto tower = find_vision_tower("efficientnet_lite", "test").make(kLite0, kLitePreprocessor, {});
  NamedTensors tensors = tower->tensors();
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
  for (size_t i = 0; i < tensors.size(); ++i) {
    at::Tensor value = tensors[i].value();
    const at::Tensor u = formula(i, value.sizes());
    const std::string& name = tensors[i].name;
    const double fan_in = static_cast<double>(value.numel() / value.size(0));
    if (name.ends_with("conv.weight"))
      value.copy_((2 * u - 1) * std::sqrt(6.0 / fan_in));
    else if (name.ends_with("norm.weight") || name.ends_with("running_var"))
      value.copy_(0.5 + u);
    else
      value.copy_(u - 0.5);
  }
  const at::Tensor pixels = (formula(1000, {1, 3, 224, 224}) * 256).to(at::kByte);
  const at::Tensor features = tower->forward(pixels);
  ASSERT_EQ(features.sizes(), at::IntArrayRef({1, 49, 1280}));
  EXPECT_EQ(tower->image_spec().num_image_tokens, 49);
  EXPECT_EQ(tower->hidden_size(), 1280);
  const auto golden = open_safetensors(kGolden / "vision_efficientnet_lite.safetensors");
  EXPECT_LT(max_difference(features[0].narrow(1, 0, 16), golden->read("slice")), 2e-3);
  EXPECT_LT(max_difference(features[0].mean(1), golden->read("mean")), 1e-4);
  EXPECT_LT(max_difference(features[0].std(1), golden->read("std")), 1e-4);

  // With a graph: the same numbers, and gradients for the weights but not for the batch statistics.
  set_trainable(tensors, true);
  const at::Tensor again = tower->forward(pixels);
  EXPECT_LT(max_difference(again.detach(), features), 1e-4);
  again.sum().backward();
  for (const NamedTensor& named : tensors)
    EXPECT_EQ(named.grad().defined(), named.name.find("running_") == std::string::npos) << named.name;
}

TEST(EfficientNetLite, ScalesWidthAndDepth) {
  const auto lite4 = make_tower({{"model_type", "efficientnet_lite"},
                                 {"image_size", 300},
                                 {"width_coefficient", 1.4},
                                 {"depth_coefficient", 1.8}});
  int64_t num_blocks = 0, last = 0;
  for (const NamedTensor& named : lite4->tensors()) {
    if (named.name.ends_with("project.conv.weight")) {
      ++num_blocks;
      last = named.value().size(0);
    }
  }
  EXPECT_EQ(num_blocks, 1 + 4 + 4 + 6 + 6 + 8 + 1);  // ceil(1.8 * repeats), the first and last stage fixed
  EXPECT_EQ(last, 448);                              // 1.4 * 320
  EXPECT_EQ(lite4->image_spec().num_image_tokens, 100);
  EXPECT_THROW(make_tower({{"model_type", "efficientnet_lite"}, {"width_coefficient", 0}}), CheckpointError);
}

// Real weights: CALDERA_EFFICIENTNET_LITE is a folder made by scripts/convert_efficientnet_lite.py, with the
// package's own
// {"pixels", "features"} in expected.safetensors beside it.
TEST(EfficientNetLite, RealWeights) {
  const char* folder = std::getenv("CALDERA_EFFICIENTNET_LITE");
  if (folder == nullptr) GTEST_SKIP() << "CALDERA_EFFICIENTNET_LITE is not set";
  const auto tower = load_vision_tower(folder, {});
  const auto expected = open_safetensors(fs::path(folder) / "expected.safetensors");
  EXPECT_LT(max_difference(tower->forward(expected->read("pixels")), expected->read("features")), 1e-3);
}

TEST(ImageProcessor, WhatItsFileSaysIsDoneOrRefused) {
  const VisionTowerSpec& spec = find_vision_tower("clip_vision_model", "here");
  const Json given = {{"image_mean", {0.5, 0.4, 0.3}}, {"image_std", {0.2, 0.25, 0.5}}};
  // What a pixel of 200 in the first channel becomes; transformers: (200 * factor - mean) / deviation.
  const auto value = [&](Json changes) {
    Json preprocessor = given;
    preprocessor.update(changes);
    const ImageSpec image = spec.make(clip_config(), preprocessor, {})->image_spec();
    return (200 / 255.0 - image.image_mean[0]) / image.image_std[0];
  };
  EXPECT_NEAR(value(Json::object()), (200 / 255.0 - 0.5) / 0.2, 1e-5);
  EXPECT_NEAR(value({{"do_normalize", false}}), 200 / 255.0, 1e-6);
  EXPECT_NEAR(value({{"do_rescale", false}}), (200 - 0.5) / 0.2, 1e-3);
  EXPECT_NEAR(value({{"do_rescale", false}, {"do_normalize", false}}), 200, 1e-3);
  EXPECT_NEAR(value({{"rescale_factor", 1 / 127.5}}), (200 / 127.5 - 0.5) / 0.2, 1e-5);
  EXPECT_NEAR(value({{"rescale_factor", 1 / 255.0}, {"do_rescale", nullptr}}), (200 / 255.0 - 0.5) / 0.2, 1e-5);

  const auto refusal = [&](const Json& changes) { return error_of<CheckpointError>([&] { value(changes); }); };
  const Json edge = {{"shortest_edge", 30}}, square = {{"height", 30}, {"width", 30}};
  EXPECT_THAT(refusal({{"do_resize", false}}), HasSubstr("preprocessor_config.json: do_resize: false"));
  EXPECT_THAT(refusal({{"size", edge}, {"do_center_crop", false}}), HasSubstr("do_center_crop: false"));
  EXPECT_THAT(refusal({{"size", {{"shortest_edge", 40}}}, {"crop_size", square}}), HasSubstr("size 40 and crop_size 30"));
  EXPECT_THAT(refusal({{"rescale_factor", 0}}), HasSubstr("rescale_factor: expected a positive number"));
  value({{"size", edge}, {"crop_size", square}, {"do_center_crop", true}});
  value({{"size", square}, {"do_center_crop", false}});
}

}  // namespace
}  // namespace caldera
