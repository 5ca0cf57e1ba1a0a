// SigLIP's tower, and towers at other picture sizes than their own, against transformers' numbers; goldens by
// scripts/make_goldens_vision.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/vision/tower.h"
#include "model/weights/load.h"
#include "tests/aten.h"
#include "tests/model/vision_golden.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

const Json kSiglip = {{"model_type", "siglip_vision_model"},
                      {"hidden_size", 20},
                      {"intermediate_size", 36},
                      {"num_hidden_layers", 3},
                      {"num_attention_heads", 2},
                      {"image_size", 30},
                      {"patch_size", 7}};
const Json kClip = {{"model_type", "clip_vision_model"},
                    {"hidden_size", 24},
                    {"intermediate_size", 40},
                    {"num_hidden_layers", 3},
                    {"num_attention_heads", 3},
                    {"image_size", 30},
                    {"patch_size", 7}};

TEST(Siglip, HiddenStatesAreTransformers) {
  const auto golden = open_safetensors(kGolden / "vision_siglip.safetensors");
  for (int64_t layer = 0; layer <= 3; ++layer) {
    const at::Tensor expected = golden->read(fmt::format("hidden.{}", layer));
    for (const int64_t index : {layer, layer - 4})
      for (const char* strategy : {"patch", "cls_patch"}) {  // there is no class token to drop
        const at::NoGradGuard no_grad;
        const auto tower = golden_tower(kSiglip, *golden, {index, strategy});
        EXPECT_LT(max_difference(tower->forward(golden->read("pixels")), expected), 1e-5) << index;
      }
  }
}

TEST(Siglip, GradientsAreTransformers) {
  const auto golden = open_safetensors(kGolden / "vision_siglip.safetensors");
  const auto tower = golden_tower(kSiglip, *golden);
  NamedTensors tensors = tower->tensors();
  set_trainable(tensors, true);
  const at::Tensor features = tower->forward(golden->read("pixels"));
  EXPECT_TRUE(at::equal(features.detach(), golden_tower(kSiglip, *golden)->forward(golden->read("pixels"))));
  (features * golden->read("cotangent")).sum().backward();
  int compared = 0;
  for (const NamedTensor& named : tensors) {
    const std::string name = "grad." + named.name;
    if (golden->has(name)) {
      const at::Tensor expected = golden->read(name);
      EXPECT_LT(max_difference(named.grad(), expected), 1e-5 * (1 + expected.abs().max().item<double>()))
          << name;
      ++compared;
    }
    const bool unused = named.name.find("layers.2.") != std::string::npos ||
                        named.name.find("head.") != std::string::npos ||
                        named.name.find("post_") != std::string::npos;
    EXPECT_EQ(named.grad().defined(), !unused) << named.name;
  }
  EXPECT_EQ(compared, 19);
}

TEST(Siglip, DescribesItself) {
  const auto tower = make_tower(kSiglip);
  const ImageSpec spec = tower->image_spec();
  EXPECT_EQ(spec.num_image_tokens, 16);
  EXPECT_EQ(spec.image_size, 30);
  EXPECT_EQ(spec.image_mean[1], 0.5f);
  EXPECT_EQ(spec.image_std[2], 0.5f);
  EXPECT_FALSE(spec.keeps_aspect);
  EXPECT_FALSE(tower->has_class_token());
  EXPECT_EQ(make_tower(tower->config())->config(), tower->config());
  const Json inside = {{"model_type", "siglip"}, {"vision_config", kSiglip}, {"text_config", Json::object()}};
  EXPECT_EQ(make_tower(inside)->config(), tower->config());
  const size_t with_head = tower->tensors().size();
  Json headless = kSiglip;
  headless["vision_use_head"] = false;
  EXPECT_EQ(make_tower(headless)->tensors().size(), with_head - 11);
  EXPECT_EQ(make_tower(headless)->config()["vision_use_head"], false);
  EXPECT_THROW(make_tower(kSiglip, {-2, "pach"}), ConfigError);
}

TEST(Siglip, FreshWeightsFollowTheRules) {
  Json config = kSiglip;
  config["hidden_size"] = 192;
  config["intermediate_size"] = 384;
  const auto tower = make_tower(config);
  find_vision_tower("siglip_vision_model", "test").init(*tower, 7);
  std::map<std::string, at::Tensor> values;
  for (const NamedTensor& named : tower->tensors()) values[named.name.substr(13)] = named.value();
  const auto deviation = [&](const char* name) { return values.at(name).std().item<double>(); };
  EXPECT_NEAR(deviation("embeddings.position_embedding.weight"), 1 / std::sqrt(192.0), 0.003);
  EXPECT_NEAR(deviation("embeddings.patch_embedding.weight"), 1 / std::sqrt(147.0), 0.003);
  EXPECT_NEAR(deviation("encoder.layers.0.self_attn.k_proj.weight"), std::sqrt(2.0 / 384), 0.001);
  EXPECT_NEAR(deviation("encoder.layers.2.mlp.fc2.weight"), std::sqrt(2.0 / 576), 0.001);
  EXPECT_NEAR(deviation("encoder.layers.1.mlp.fc1.bias"), 1e-6, 1e-7);
  EXPECT_TRUE((values.at("post_layernorm.weight") == 1).all().item<bool>());
  EXPECT_TRUE((values.at("encoder.layers.1.self_attn.q_proj.bias") == 0).all().item<bool>());
}

TEST(ImageSize, PositionsAreInterpolatedAsTransformersDoes) {
  const at::NoGradGuard no_grad;
  const auto weights = open_safetensors(kGolden / "vision_clip.safetensors");
  const auto golden = open_safetensors(kGolden / "vision_clip_sizes.safetensors");
  for (const int64_t size : {16, 49}) {  // grids of 2 and 7 instead of 4
    const auto tower = golden_tower(kClip, *weights);
    tower->set_image_size(size);
    EXPECT_EQ(tower->image_spec().image_size, size);
    EXPECT_EQ(tower->image_spec().num_image_tokens, size / 7 * (size / 7));
    EXPECT_EQ(tower->config()["image_size"], size);
    const at::Tensor expected = golden->read(fmt::format("hidden.{}", size));
    const at::Tensor got = tower->forward(golden->read(fmt::format("pixels.{}", size)));
    EXPECT_LT(max_difference(got, expected.narrow(1, 1, expected.size(1) - 1)), 1e-5) << size;
  }
  const auto siglip = open_safetensors(kGolden / "vision_siglip.safetensors");
  const auto tower = golden_tower(kSiglip, *siglip);
  tower->set_image_size(43);
  EXPECT_LT(max_difference(tower->forward(siglip->read("large.pixels")), siglip->read("large.hidden")), 1e-5);
  EXPECT_THROW(tower->forward(siglip->read("pixels")), DataError);
}

TEST(ImageSize, TheSameGridChangesNothing) {
  const auto weights = open_safetensors(kGolden / "vision_clip.safetensors");
  const auto tower = golden_tower(kClip, *weights);
  tower->set_image_size(28);  // a grid of 4 with no pixels left over
  EXPECT_TRUE(at::equal(tower->tensors()[2].value(),
                        weights->read("weights.vision_model.embeddings.position_embedding.weight")));
}

TEST(ImageSize, OnlySizesOfAPatchAndMore) {
  for (const Json& config : {kClip, kSiglip}) {
    EXPECT_THROW(make_tower(config)->set_image_size(6), ConfigError);
    EXPECT_THROW(make_tower(config)->set_image_size(8193), ConfigError);
  }
  const auto lite = make_tower({{"model_type", "efficientnet_lite"}, {"image_size", 224}});
  lite->set_image_size(96);
  EXPECT_EQ(lite->image_spec().num_image_tokens, 9);
  EXPECT_THROW(lite->set_image_size(16), ConfigError);
}

TEST(ImageSize, LoadedFoldersTakeIt) {
  const TemporaryFolder temporary;
  const fs::path& folder = temporary.path();
  write_json(folder / "config.json", kSiglip);
  const auto fresh = load_vision_tower(folder, {}, 3, 49);
  EXPECT_EQ(fresh->image_spec().num_image_tokens, 49);
  EXPECT_EQ(make_vision_tower(folder, {}, 49)->image_spec().num_image_tokens, 49);
  // Written at its new size it is an ordinary tower of that size.
  TensorList tensors;
  for (const NamedTensor& named : fresh->tensors()) tensors.emplace_back(named.name, named.value());
  write_weights_folder(folder, tensors);
  write_json(folder / "config.json", fresh->config());
  const at::Tensor pixels = at::arange(3 * 49 * 49).remainder(256).to(at::kByte).view({1, 3, 49, 49});
  EXPECT_TRUE(at::equal(load_vision_tower(folder, {})->forward(pixels), fresh->forward(pixels)));
}

TEST(SiglipImageSpec, KindOfResizingComesFromThePreprocessor) {
  const auto keeps = [](const Json& config, const Json& size) {
    return make_tower(config, {}, {{"size", size}})->image_spec().keeps_aspect;
  };
  EXPECT_TRUE(keeps(kClip, {{"shortest_edge", 30}}));
  EXPECT_TRUE(keeps(kClip, 30));
  EXPECT_FALSE(keeps(kClip, {{"height", 30}, {"width", 30}}));
  EXPECT_FALSE(keeps(kSiglip, {{"height", 30}, {"width", 30}}));
  EXPECT_TRUE(keeps(kSiglip, {{"shortest_edge", 30}}));
  EXPECT_TRUE(keeps(kClip, "odd"));
}

}  // namespace
}  // namespace caldera
