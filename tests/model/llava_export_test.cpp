// The original LLaVA's layout is read back, and what torch.save's format holds is what was written. What
// LLaVA's own code makes of the names is judged by tests/parity/original_llava.py.
#include "model/weights/llava_export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/weights/torch_pickle.h"
#include "model/weights/torch_pickle_write.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

class LlavaExportTest : public testing::Test {
 protected:
  void SetUp() override { fs::create_directories(folder_ / "tower"); }

  static std::unique_ptr<LlavaModel> llava(const std::string& projector, const std::string& decoder = "llama",
                                           const std::string& tower = "clip_vision_model") {
    const VisionTowerSpec& spec = find_vision_tower(tower, "test");
    auto model = std::make_unique<LlavaModel>();
    model->vision = spec.make({{"model_type", tower},
                               {"hidden_size", 24},
                               {"intermediate_size", 40},
                               {"num_hidden_layers", 3},
                               {"num_attention_heads", 3},
                               {"image_size", 28},
                               {"patch_size", 7}},
                              Json::object(), {});
    spec.init(*model->vision, 5);
    const LanguageModelSpec& language = find_language_model(decoder, "test");
    model->language = language.make({{"model_type", decoder},
                                     {"hidden_size", 32},
                                     {"intermediate_size", 48},
                                     {"num_hidden_layers", 2},
                                     {"num_attention_heads", 4},
                                     {"num_key_value_heads", 2},
                                     {"vocab_size", 50},
                                     {"max_position_embeddings", 64}});
    language.init(*model->language, 5);
    model->mm_projector_type = projector;
    model->projector = make_projector(projector, 24, 32);
    init_projector(*model->projector, 5);
    return model;
  }
  LlavaExportOptions options(at::ScalarType dtype = at::kFloat) const {
    return {.dtype = dtype, .mm_vision_tower = (folder_ / "tower").string(), .model_max_length = 64};
  }
  TemporaryFolder temporary_;
  const fs::path folder_ = temporary_.path();
};

TEST_F(LlavaExportTest, WholeModelsComeBackBitForBit) {
  for (const char* projector : {"mlp2x_gelu", "mlp3x_gelu", "linear"}) {
    for (const char* decoder : {"llama", "mistral"}) {
      const auto model = llava(projector, decoder);
      save_hf_component(*model, "vision_tower", at::kFloat, folder_ / "tower");
      const fs::path out = folder_ / fmt::format("{}-{}", projector, decoder);
      fs::create_directories(out);
      save_original_llava(*model, {"v1", "pad", 0, {{"step", 3}}}, options(), out);
      const LoadedModel loaded = load_llava(out);
      const NamedTensors wanted = model->tensors(), got = loaded.model->tensors();
      ASSERT_EQ(wanted.size(), got.size());
      for (size_t i = 0; i < wanted.size(); ++i) {
        EXPECT_EQ(wanted[i].name, got[i].name);
        EXPECT_TRUE(at::equal(wanted[i].value(), got[i].value())) << wanted[i].name;
      }
      EXPECT_EQ(loaded.model->mm_projector_type, projector);
      EXPECT_EQ(loaded.card.image_aspect_ratio, "pad");
      EXPECT_EQ(loaded.card.conversation_template, "v1");
    }
  }
}

TEST_F(LlavaExportTest, WritesTheNamesAndKeysOfLlava) {
  const auto model = llava("mlp2x_gelu");
  save_original_llava(*model, {"v1", "pad", 0, {}}, options(), folder_);
  const Json config = read_json(folder_ / "config.json");
  EXPECT_EQ(config["architectures"], Json({"LlavaLlamaForCausalLM"}));
  EXPECT_EQ(config["model_type"], "llava_llama");
  EXPECT_EQ(config["mm_vision_tower"], (folder_ / "tower").string());
  EXPECT_EQ(config["mm_projector_type"], "mlp2x_gelu");
  EXPECT_EQ(config["mm_hidden_size"], 24);
  EXPECT_EQ(config["mm_vision_select_layer"], -2);
  EXPECT_EQ(config["mm_vision_select_feature"], "patch");
  EXPECT_EQ(config["mm_use_im_start_end"], false);
  EXPECT_EQ(config["mm_use_im_patch_token"], false);
  EXPECT_EQ(config["image_aspect_ratio"], "pad");
  EXPECT_EQ(config["tokenizer_model_max_length"], 64);
  EXPECT_EQ(config["vocab_size"], 50);
  EXPECT_EQ(config["use_mm_proj"], true);
  const auto source = open_weights_folder(folder_);
  for (const char* name :
       {"model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight",
        "lm_head.weight", "model.mm_projector.0.weight", "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight"})
    EXPECT_TRUE(source->has(name)) << name;
  EXPECT_EQ(source->shape("model.embed_tokens.weight")[0], 50);  // no padding: LLaVA has no <image> token
}

TEST_F(LlavaExportTest, ShardsAboveTheSizeAsked) {
  const auto model = llava("mlp2x_gelu");
  LlavaExportOptions small = options();
  small.max_shard_bytes = 20000;
  save_original_llava(*model, {}, small, folder_);
  EXPECT_TRUE(fs::exists(folder_ / "model.safetensors.index.json"));
  EXPECT_FALSE(fs::exists(folder_ / "model.safetensors"));
  EXPECT_EQ(open_weights_folder(folder_)->names().size(), model->tensors().size());
}

TEST_F(LlavaExportTest, TheProjectorAloneIsStageOnes) {
  for (const char* projector : {"mlp2x_gelu", "linear"}) {
    const auto model = llava(projector);
    save_original_projector(*model, {"plain", "square", 0, {}}, options(at::kBFloat16), folder_);
    const auto source = open_torch_pickle(folder_ / "mm_projector.bin");
    const bool linear = model->mm_projector_type == "linear";
    EXPECT_EQ(source->names().size(), linear ? 2u : 4u);
    const at::Tensor first =
        source->read(linear ? "model.mm_projector.weight" : "model.mm_projector.0.weight");
    EXPECT_EQ(first.scalar_type(), at::kBFloat16);
    EXPECT_TRUE(at::equal(first, model->projector->tensors()[0].value().to(at::kBFloat16)));
    EXPECT_EQ(read_json(folder_ / "config.json")["tune_mm_mlp_adapter"], true);
  }
}

TEST_F(LlavaExportTest, WhatLlavaHasNotIsRefused) {
  EXPECT_THAT(error_of<Error>([&] { check_original_llava(*llava("mlp2x_gelu", "qwen2")); }),
              HasSubstr("LLaMA and Mistral decoders, not this model's qwen2"));
  EXPECT_THAT(
      error_of<Error>([&] { check_original_llava(*llava("mlp2x_gelu", "llama", "siglip_vision_model")); }),
      HasSubstr("CLIP towers only, not this model's siglip"));
  auto identity = llava("mlp2x_gelu");
  identity->mm_projector_type = "identity";
  EXPECT_THAT(error_of<Error>([&] { save_original_projector(*identity, {}, options(), folder_); }),
              HasSubstr("no weights"));
}

TEST_F(LlavaExportTest, TorchPicklesComeBack) {
  const fs::path file = folder_ / "x.bin";
  const TensorList tensors = {{"a", at::arange(6, at::kFloat).reshape({2, 3}).t()},  // written as rows
                              {"h\xC3\xA4lf", at::randn({5}).to(at::kHalf)},
                              {"b", at::randn({1, 2, 3}).to(at::kBFloat16)},
                              {"scalar", at::tensor(3.5f)},
                              {"ids", at::arange(4, at::kLong)}};
  write_torch_pickle(file, tensors);
  const auto source = open_torch_pickle(file);
  EXPECT_EQ(source->names().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor read = source->read(name);
    EXPECT_EQ(read.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(read, tensor)) << name;
  }
  EXPECT_THAT(error_of<Error>([&] {
                write_torch_pickle(file, {{"x", at::zeros({2}, at::kByte)}});
              }),
              HasSubstr("type Byte"));
}

}  // namespace
}  // namespace caldera
