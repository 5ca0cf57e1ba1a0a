// GGUF files are read back, tensor by tensor, and refused where llama.cpp has no such model.
#include "model/weights/gguf_export.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/gguf.h"
#include "base/log.h"
#include "model/weights/gguf_encode.h"
#include "model/weights/gguf_names.h"
#include "model/weights/gguf_weights.h"
#include "model/weights/load.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

const std::pair<GgmlType, at::ScalarType> kFloatTypes[] = {
    {GgmlType::kF32, at::kFloat}, {GgmlType::kF16, at::kHalf}, {GgmlType::kBF16, at::kBFloat16}};

class GgufExportTest : public testing::Test {
 protected:

  static Json decoder_config(const std::string& model_type, const Json& change = Json::object()) {
    Json config = {{"model_type", model_type}, {"hidden_size", 64},        {"intermediate_size", 96},
                   {"num_hidden_layers", 2},   {"num_attention_heads", 6}, {"num_key_value_heads", 2},
                   {"head_dim", 32},           {"vocab_size", 50},         {"max_position_embeddings", 256},
                   {"initializer_range", 0.2}, {"rope_theta", 5000.0},     {"rms_norm_eps", 1e-5}};
    config.update(change);
    return config;
  }
  // Every tensor random, biases and norms too.
  static std::unique_ptr<LanguageModel> decoder(const Json& config) {
    auto model = find_language_model(config.at("model_type"), "test").make(config);
    at::manual_seed(3);
    for (const NamedTensor& named : model->tensors()) {
      at::Tensor value = named.value();
      value.normal_(0, 0.3);
    }
    return model;
  }
  static std::unique_ptr<LlavaModel> llava(const std::string& tower, const std::string& projector,
                                           VisionFeatures features = {}) {
    const VisionTowerSpec& spec = find_vision_tower(tower, "test");
    const Json config =
        tower == "efficientnet_lite"
            ? Json{{"model_type", tower}}
            : Json{{"model_type", tower},    {"hidden_size", 64},        {"intermediate_size", 80},
                   {"num_hidden_layers", 4}, {"num_attention_heads", 4}, {"image_size", 28},
                   {"patch_size", 7}};
    auto model = std::make_unique<LlavaModel>();
    model->features = features;
    model->vision = spec.make(config, Json::object(), features);
    spec.init(*model->vision, 5);
    model->language = decoder(decoder_config("llama"));
    model->mm_projector_type = projector;
    model->projector =
        make_projector(projector, model->vision->hidden_size(), model->language->hidden_size());
    init_projector(*model->projector, 5);
    return model;
  }
  GgufExportOptions options(GgmlType type) const { return {.type = type, .image_aspect_ratio = "pad"}; }
  fs::path file() const { return folder_ / "x.gguf"; }
  TemporaryFolder temporary_;
  const fs::path folder_ = temporary_.path();
};

at::Tensor logits_of(LanguageModel& model) {
  const at::NoGradGuard no_grad;
  const at::Tensor ids = at::arange(20, at::kLong) * 7 % 50;
  const at::Tensor hidden = model.forward(model.embed(ids), at::arange(20, at::kLong), {0, 20}, {});
  return at::linear(hidden, model.head_weight());
}

TEST_F(GgufExportTest, EveryDecoderComesBackBitForBit) {
  const std::vector<Json> configs = {
      decoder_config("llama"),
      decoder_config("llama", {{"attention_bias", true}, {"mlp_bias", true}, {"tie_word_embeddings", true}}),
      decoder_config("llama", {{"rope_scaling", {{"rope_type", "linear"}, {"factor", 2.5}}}}),
      decoder_config("llama", {{"rope_scaling",
                                {{"rope_type", "llama3"},
                                 {"factor", 8.0},
                                 {"low_freq_factor", 1.0},
                                 {"high_freq_factor", 4.0},
                                 {"original_max_position_embeddings", 64}}}}),
      decoder_config("qwen2",
                     {{"rope_scaling",
                       {{"rope_type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 64}}}}),
      decoder_config("qwen2", {{"rope_scaling",
                                {{"rope_type", "yarn"},
                                 {"factor", 4.0},
                                 {"attention_factor", 1.3},
                                 {"beta_fast", 16.0},
                                 {"beta_slow", 2.0},
                                 {"original_max_position_embeddings", 64}}}}),
      decoder_config("mistral", {{"sliding_window", nullptr}}),
      decoder_config("qwen3"),
  };
  for (const Json& config : configs) {
    const auto model = decoder(config);
    for (const auto& [type, dtype] : kFloatTypes) {
      save_gguf_decoder(*model, options(type), file());
      const auto back = load_language_model(file());
      const NamedTensors wanted = model->tensors(), got = back->tensors();
      ASSERT_EQ(wanted.size(), got.size()) << config;
      for (size_t i = 0; i < wanted.size(); ++i) {
        at::Tensor expected = wanted[i].value();
        if (expected.dim() == 2) expected = expected.to(dtype).to(at::kFloat);  // vectors stay float32
        EXPECT_EQ(wanted[i].name, got[i].name);
        EXPECT_TRUE(at::equal(expected, got[i].value())) << wanted[i].name << " " << config;
      }
      if (type != GgmlType::kF32) continue;
      // The configuration came back too: the same numbers come out (metadata are float32).
      const at::Tensor before = logits_of(*model), after = logits_of(*back);
      EXPECT_LT((before - after).abs().max().item<float>() / before.abs().max().item<float>(), 1e-5f)
          << config;
      EXPECT_EQ(back->max_position_embeddings(), 256);
    }
  }
}

TEST_F(GgufExportTest, Q8StaysWithinItsStep) {
  const auto model =
      decoder(decoder_config("qwen3", {{"intermediate_size", 80}}));  // rows of 80 are no whole blocks
  save_gguf_decoder(*model, options(GgmlType::kQ8_0), file());
  const auto back = load_language_model(file());
  const NamedTensors wanted = model->tensors(), got = back->tensors();
  for (size_t i = 0; i < wanted.size(); ++i) {
    const at::Tensor x = wanted[i].value(), y = got[i].value();
    if (x.dim() == 1) {
      EXPECT_TRUE(at::equal(x, y)) << wanted[i].name;
    } else if (wanted[i].name.ends_with("down_proj.weight")) {
      EXPECT_TRUE(at::equal(x.to(at::kHalf).to(at::kFloat), y)) << wanted[i].name;
    } else {
      const at::Tensor blocks = x.reshape({-1, 32}), step = blocks.abs().amax(1, true) / 127;
      // Half a step, and the rounding of the scale to float16 (11 bits) at up to 127 steps.
      const at::Tensor bound = step * (0.5 + 127.0 / 2048);
      EXPECT_TRUE(((blocks - y.reshape({-1, 32})).abs() <= bound).all().item<bool>()) << wanted[i].name;
    }
  }
}

TEST_F(GgufExportTest, QuantisesAsGgmlDoes) {
  // 1/127 is exact enough in float32: every product lands on or next to an integer, halves go away from zero.
  at::Tensor x = at::zeros({1, 32});
  x[0][0] = 127.0f;
  x[0][1] = -0.5f;
  x[0][2] = 2.5f;
  x[0][3] = -126.4f;
  const std::vector<std::byte> bytes = encode_ggml(x, GgmlType::kQ8_0, "x");
  ASSERT_EQ(bytes.size(), 34u);
  EXPECT_EQ(std::to_integer<int>(bytes[0]) | std::to_integer<int>(bytes[1]) << 8, 0x3C00);  // 1.0
  const auto quant = [&](size_t i) { return std::to_integer<int8_t>(bytes[2 + i]); };
  EXPECT_EQ(quant(0), 127);
  EXPECT_EQ(quant(1), -1);
  EXPECT_EQ(quant(2), 3);
  EXPECT_EQ(quant(3), -126);
  EXPECT_EQ(quant(4), 0);
  const std::vector<std::byte> zeros = encode_ggml(at::zeros({1, 32}), GgmlType::kQ8_0, "x");
  EXPECT_EQ(zeros, std::vector<std::byte>(34));
}

// Goldens by scripts/make_goldens_gguf_quants.py.
TEST_F(GgufExportTest, BytesAreThoseOfGgmlsQuantisers) {
  const auto expected = open_safetensors(kGolden / "gguf_quants.safetensors");
  const std::map<std::string, GgmlType> types = {{"Q5_0", GgmlType::kQ5_0}, {"Q5_1", GgmlType::kQ5_1},
                                                 {"Q8_0", GgmlType::kQ8_0}, {"Q4_K", GgmlType::kQ4_K},
                                                 {"Q5_K", GgmlType::kQ5_K}, {"Q6_K", GgmlType::kQ6_K}};
  for (const auto& [name, type] : types) {
    const std::vector<std::byte> bytes = encode_ggml(expected->read("values"), type, "x");
    const at::Tensor wanted = expected->read(name + ".quantised");
    ASSERT_EQ(bytes.size(), wanted.nbytes());
    const auto* reference = static_cast<const std::byte*>(wanted.const_data_ptr());
    const auto differ = std::mismatch(bytes.begin(), bytes.end(), reference);
    EXPECT_TRUE(differ.first == bytes.end()) << name << " at byte " << differ.first - bytes.begin();
  }
}

// Which matrices get more bits, and what rows of other lengths become, as llama-quantize has it.
TEST_F(GgufExportTest, MixturesOfTypes) {
  using Types = std::map<std::string, uint32_t>;
  const auto types_of = [&](GgmlType type, const Json& change) {
    Json config = {{"hidden_size", 256},       {"intermediate_size", 256}, {"num_hidden_layers", 8},
                   {"num_attention_heads", 4}, {"num_key_value_heads", 2}, {"head_dim", 64}};
    config.update(change);
    save_gguf_decoder(*decoder(decoder_config("llama", config)), options(type), file());
    Types types;
    const GgufFile written(file());
    EXPECT_EQ(written.get<int64_t>("general.file_type"), type == GgmlType::kQ4_K   ? 15
                                                         : type == GgmlType::kQ5_K ? 17
                                                                                   : 18);
    for (const GgufTensor& tensor : written.tensors()) types[tensor.name] = tensor.type;
    return types;
  };
  for (const auto& [type, number] : {std::pair(GgmlType::kQ4_K, 12u), {GgmlType::kQ5_K, 13u}}) {
    Types types = types_of(type, Json::object());
    EXPECT_EQ(types["token_embd.weight"], number);
    EXPECT_EQ(types["output.weight"], 14u);
    EXPECT_EQ(types["output_norm.weight"], 0u);
    for (int layer = 0; layer < 8; ++layer) {  // the first, the last, and every third between
      const bool has_more = layer == 0 || layer == 3 || layer == 6 || layer == 7;
      for (const char* name : {"attn_v", "ffn_down"})
        EXPECT_EQ(types[fmt::format("blk.{}.{}.weight", layer, name)], has_more ? 14u : number)
            << name << layer;
      for (const char* name : {"attn_q", "attn_k", "attn_output", "ffn_up", "ffn_gate"})
        EXPECT_EQ(types[fmt::format("blk.{}.{}.weight", layer, name)], number) << name << layer;
    }
    EXPECT_EQ(types_of(type, {{"tie_word_embeddings", true}})["token_embd.weight"], 14u);
  }
  Types six = types_of(GgmlType::kQ6_K, Json::object());
  EXPECT_EQ(six["token_embd.weight"], 14u);
  EXPECT_EQ(six["blk.1.ffn_down.weight"], 14u);
  // Rows of 96 are whole blocks of 32 alone, rows of 80 of no type.
  const Json narrow = {{"intermediate_size", 96}, {"num_hidden_layers", 2}};
  const Json odd = {{"intermediate_size", 80}, {"num_hidden_layers", 2}};
  EXPECT_EQ(types_of(GgmlType::kQ4_K, narrow)["blk.1.ffn_down.weight"], 8u);  // q6_k there
  EXPECT_EQ(types_of(GgmlType::kQ4_K, odd)["blk.1.ffn_down.weight"], 1u);
  const Json middle = {{"intermediate_size", 96}, {"num_hidden_layers", 8}};
  EXPECT_EQ(types_of(GgmlType::kQ4_K, middle)["blk.1.ffn_down.weight"], 6u);
  EXPECT_EQ(types_of(GgmlType::kQ5_K, middle)["blk.1.ffn_down.weight"], 7u);
  EXPECT_EQ(types_of(GgmlType::kQ6_K, middle)["blk.1.ffn_down.weight"], 8u);
  // Eight heads share one attn_v in models of 80 layers: q5_k (here q5_1) instead of q4_k (q5_0).
  const Json large = {
      {"num_hidden_layers", 80}, {"hidden_size", 32}, {"intermediate_size", 32}, {"head_dim", 8}};
  Types deep = types_of(GgmlType::kQ4_K, large);
  EXPECT_EQ(deep["blk.10.attn_v.weight"], 7u);
  EXPECT_EQ(deep["blk.10.ffn_down.weight"], 6u);

  EXPECT_EQ(quantized_ggml_type("q4_k_m"), GgmlType::kQ4_K);
  EXPECT_FALSE(quantized_ggml_type("q4_0").has_value());
  EXPECT_EQ(mmproj_ggml_type(GgmlType::kQ4_K), GgmlType::kF16);
  EXPECT_EQ(mmproj_ggml_type(GgmlType::kQ8_0), GgmlType::kQ8_0);
}

// What was written reads back within the step of its type.
TEST_F(GgufExportTest, KTypesComeBackWithinTheirError) {
  const auto model =
      decoder(decoder_config("qwen3", {{"hidden_size", 256}, {"intermediate_size", 256}, {"head_dim", 64}}));
  const std::vector<std::pair<GgmlType, double>> bounds = {
      {GgmlType::kQ4_K, 0.09}, {GgmlType::kQ5_K, 0.045}, {GgmlType::kQ6_K, 0.025}};
  for (const auto& [type, bound] : bounds) {
    save_gguf_decoder(*model, options(type), file());
    const auto back = load_language_model(file());
    const NamedTensors wanted = model->tensors(), got = back->tensors();
    for (size_t i = 0; i < wanted.size(); ++i) {
      const at::Tensor x = wanted[i].value(),
                       error = (x - got[i].value()).pow(2).mean().sqrt() / x.pow(2).mean().sqrt();
      EXPECT_LT(error.item<double>(), x.dim() == 1 ? 1e-7 : bound) << wanted[i].name;
    }
  }
}

TEST_F(GgufExportTest, ValuesBeyondATypeAreRefused) {
  const at::Tensor large = at::full({1, 32}, 70000.0);
  EXPECT_THAT(error_of<Error>([&] { encode_ggml(large, GgmlType::kF16, "big"); }),
              HasSubstr("big: a value of 70000 is beyond float16; export bf16 or f32"));
  EXPECT_EQ(error_of<Error>([&] { encode_ggml(large, GgmlType::kQ8_0, "big"); }), "accepted");
  EXPECT_THAT(error_of<Error>([&] { encode_ggml(large * 1000, GgmlType::kQ8_0, "big"); }),
              HasSubstr("q8_0's float16 scales"));
  EXPECT_THAT(error_of<Error>([&] {
                encode_ggml(at::full({1, 256}, 70000.0), GgmlType::kQ4_K, "big");
              }),
              HasSubstr("q4_k's float16 scales"));
  EXPECT_THAT(error_of<Error>([&] { encode_ggml(large / 0, GgmlType::kQ8_0, "big"); }),
              HasSubstr("not finite"));
  EXPECT_EQ(error_of<Error>([&] { encode_ggml(large / 0, GgmlType::kF16, "big"); }), "accepted");
}

TEST_F(GgufExportTest, MmprojHoldsWhatLlamaCppRuns) {
  for (const char* tower : {"clip_vision_model", "siglip_vision_model"}) {
    const auto model = llava(tower, "mlp2x_gelu");
    for (const auto& [type, dtype] : kFloatTypes) {
      save_gguf_mmproj(*model, options(type), file());
      const GgufFile read(file());
      EXPECT_EQ(read.get<std::string>("general.architecture"), "clip");
      EXPECT_EQ(read.get<std::string>("clip.projector_type"), "mlp");
      EXPECT_EQ(read.get<int64_t>("clip.vision.block_count"), 3);  // hidden_states[-2] of four blocks
      EXPECT_THAT(read.get<std::vector<int64_t>>("clip.vision.feature_layer"), testing::ElementsAre(3));
      EXPECT_EQ(read.get<bool>("clip.use_gelu"), std::string(tower) == "siglip_vision_model");
      EXPECT_EQ(read.get<int64_t>("clip.vision.image_size"), 28);
      std::map<std::string, at::Tensor> tensors;
      for (const GgufTensor& tensor : read.tensors())
        tensors[tensor.name] = dequantize(tensor, "x").to(at::kFloat);
      size_t count = 0;
      for (const NamedTensor& named : model->vision->tensors()) {
        const std::string name = gguf_tower_name(named.name);
        const bool is_unused = named.name.find("layers.3.") != std::string::npos ||
                               named.name.find("post_layernorm") != std::string::npos;
        if (name.empty() || is_unused) continue;
        at::Tensor expected = named.value();
        const bool exact =
            name == "v.position_embd.weight" || (name == "v.patch_embd.weight" && type != GgmlType::kF16);
        if (expected.dim() > 1 && !exact) expected = expected.to(dtype).to(at::kFloat);
        ASSERT_TRUE(tensors.contains(name)) << name;
        EXPECT_TRUE(at::equal(tensors[name], expected)) << name;
        ++count;
      }
      for (const NamedTensor& named : model->projector->tensors()) {
        const std::string name = (named.name[7] == '1' ? "mm.0." : "mm.2.") + named.name.substr(9);
        at::Tensor expected = named.value();
        if (expected.dim() > 1) expected = expected.to(dtype).to(at::kFloat);
        EXPECT_TRUE(at::equal(tensors[name], expected)) << name;
        ++count;
      }
      EXPECT_EQ(count,
                tensors.size());  // nothing else: post_layernorm would be applied, the fourth block run
    }
  }
}

// Decoder and mmproj as an export writes them.
class GgufFolderTest : public GgufExportTest {
 protected:
  void write(LlavaModel& model, GgmlType type, const ModelCard* card = nullptr) {
    GgufExportOptions given = options(type);
    if (card != nullptr) given.general = {{"caldera.card", json_line(to_json(*card))}};
    save_gguf_decoder(*model.language, given, folder_ / "model-f16.gguf");
    save_gguf_mmproj(model, given, folder_ / "mmproj-f16.gguf");
  }
  void edit(const char* name, const std::string& from, const std::string& to) {
    std::string bytes = read_file(folder_ / name);
    bytes.replace(bytes.find(from), from.size(), to);
    write_file_atomic(folder_ / name, bytes);
  }
};

TEST_F(GgufFolderTest, AWholeModelComesBack) {
  for (const char* tower : {"clip_vision_model", "siglip_vision_model"}) {
    const auto model = llava(tower, "mlp2x_gelu");
    const at::Tensor pixels = (at::arange(2 * 3 * 28 * 28) % 251).to(at::kByte).view({2, 3, 28, 28});
    const at::NoGradGuard no_grad;
    const auto features = [&](LlavaModel& of) { return of.projector->forward(of.vision->forward(pixels)); };
    for (const auto& [type, dtype] : kFloatTypes) {
      write(*model, type);
      const LoadedModel back = load_llava(folder_);
      std::map<std::string, at::Tensor> wanted;
      for (const NamedTensor& named : model->tensors()) wanted[named.name] = named.value();
      for (const NamedTensor& named : back.model->tensors()) {
        at::Tensor expected = wanted.at(named.name);
        const bool exact = named.name.ends_with("position_embedding.weight") ||
                           (named.name.ends_with("patch_embedding.weight") && type != GgmlType::kF16);
        if (expected.dim() > 1 && !exact) expected = expected.to(dtype).to(at::kFloat);
        EXPECT_TRUE(at::equal(named.value(), expected)) << named.name;
      }
      EXPECT_EQ(back.model->vision->config()["num_hidden_layers"], 3);
      EXPECT_EQ(read_image_spec(folder_)->image_mean, model->vision->image_spec().image_mean);
      if (type != GgmlType::kF32) continue;
      EXPECT_TRUE(at::equal(features(*model), features(*back.model))) << tower;
    }
  }
}

TEST_F(GgufFolderTest, CarriesTheCardOfAnExport) {
  const auto model = llava("clip_vision_model", "mlp2x_gelu");
  write(*model, GgmlType::kF32);
  EXPECT_EQ(read_model_card(folder_).conversation_template, "");
  EXPECT_EQ(read_model_card(folder_).image_aspect_ratio, "pad");  // as llama.cpp
  const ModelCard card = {.conversation_template = "v1", .image_aspect_ratio = "square"};
  write(*model, GgmlType::kF32, &card);
  EXPECT_EQ(load_llava(folder_).card.conversation_template, "v1");
  EXPECT_EQ(load_llava(folder_).card.image_aspect_ratio, "square");
}

TEST_F(GgufFolderTest, WithoutANamedLayerAllBlocksButTheLastRun) {
  const auto model = llava("clip_vision_model", "mlp2x_gelu");
  write(*model, GgmlType::kF32);
  edit("mmproj-f16.gguf", "feature_layer", "feature_later");
  EXPECT_EQ(load_llava(folder_).model->features.vision_feature_layer, 2);  // of three blocks written
}

// As llama.cpp's first converters wrote it: the names of an MLP's layers change places.
TEST_F(GgufFolderTest, AnOldMmprojNamesTheMlpTheOtherWayRound) {
  const auto model = llava("clip_vision_model", "mlp2x_gelu");
  write(*model, GgmlType::kF32);
  std::string bytes = read_file(folder_ / "mmproj-f16.gguf");
  const auto entry = [](const std::string& name) {
    const uint64_t size = name.size();
    return std::string(reinterpret_cast<const char*>(&size), sizeof(size)) + name;
  };
  int64_t num_swapped = 0;
  for (int block = 0; block < 3; ++block)
    for (const char* parameter : {"weight", "bias"}) {
      const std::string up = entry(fmt::format("v.blk.{}.ffn_up.{}", block, parameter)),
                        down = entry(fmt::format("v.blk.{}.ffn_down.{}", block, parameter));
      const size_t at_up = bytes.find(up), at_down = bytes.find(down);
      ASSERT_LT(std::max(at_up, at_down), bytes.size());
      const bool up_first = at_up < at_down;
      bytes.replace(std::max(at_up, at_down), (up_first ? down : up).size(), up_first ? up : down);
      bytes.replace(std::min(at_up, at_down), (up_first ? up : down).size(), up_first ? down : up);
      ++num_swapped;
    }
  EXPECT_EQ(num_swapped, 6);
  write_file_atomic(folder_ / "mmproj-f16.gguf", bytes);
  const LoadedModel back = load_llava(folder_);
  std::map<std::string, at::Tensor> wanted;
  for (const NamedTensor& named : model->tensors()) wanted[named.name] = named.value();
  for (const NamedTensor& named : back.model->tensors())
    EXPECT_TRUE(at::equal(named.value(), wanted.at(named.name))) << named.name;
}

TEST_F(GgufFolderTest, WhatItCannotBeIsSaid) {
  const auto model = llava("clip_vision_model", "mlp2x_gelu");
  const auto error = [&] { return error_of<CheckpointError>([&] { load_llava(folder_); }); };
  write(*model, GgmlType::kF32);
  edit("mmproj-f16.gguf", "mm.2.weight", "mm.3.weight");
  EXPECT_THAT(error(), HasSubstr("mmproj-f16.gguf: tensor mm.3.weight has no place in architecture clip"));
  write(*model, GgmlType::kF32);
  edit("mmproj-f16.gguf", "projector_type", "projector_tape");
  EXPECT_THAT(error(), HasSubstr("clip.projector_type"));
  write(*model, GgmlType::kF32);
  edit("mmproj-f16.gguf", "v.pre_ln.weight", "v.post_ln.weigh");
  EXPECT_THAT(error(), HasSubstr("v.post_ln.weigh has no place"));
  write(*model, GgmlType::kF32);
  fs::copy(folder_ / "model-f16.gguf", folder_ / "model-again.gguf");
  EXPECT_THAT(error(), HasSubstr("expected one decoder's .gguf and one mmproj*.gguf, got 2 and 1"));
  EXPECT_THAT(error_of<CheckpointError>([&] { load_llava(folder_ / "model-f16.gguf"); }),
              HasSubstr("name the folder with the decoder's and its mmproj*.gguf"));
}

TEST_F(GgufExportTest, WhatLlamaCppCannotRepresentIsRefusedWithTheReason) {
  EXPECT_THAT(error_of<Error>([&] { check_gguf_mmproj(*llava("clip_vision_model", "linear")); }),
              HasSubstr("this model's, linear, cannot be written so that it gives the same features"));
  EXPECT_THAT(error_of<Error>([&] { check_gguf_mmproj(*llava("clip_vision_model", "identity")); }),
              HasSubstr("identity"));
  EXPECT_THAT(error_of<Error>([&] { check_gguf_mmproj(*llava("clip_vision_model", "mlp3x_gelu")); }),
              HasSubstr("mlp3x_gelu"));
  EXPECT_THAT(error_of<Error>([&] {
                check_gguf_mmproj(*llava("clip_vision_model", "mlp2x_gelu",
                                         {.vision_feature_select_strategy = "cls_patch"}));
              }),
              HasSubstr("llama.cpp leaves the class token's feature out"));
  EXPECT_THAT(error_of<Error>([&] { check_gguf_mmproj(*llava("efficientnet_lite", "mlp2x_gelu")); }),
              HasSubstr("CLIP and SigLIP towers, not this model's efficientnet"));
  const auto yarn = decoder(decoder_config(
      "qwen2", {{"rope_scaling", {{"rope_type", "yarn"}, {"factor", 4.0}, {"truncate", false}}}}));
  EXPECT_THAT(error_of<Error>([&] { save_gguf_decoder(*yarn, options(GgmlType::kF32), file()); }),
              HasSubstr("\"truncate\": false"));
  EXPECT_FALSE(fs::exists(file()));
}

TEST_F(GgufExportTest, ASlidingWindowLimitsTheContext) {
  const auto model = decoder(decoder_config("mistral", {{"sliding_window", 100}}));
  save_gguf_decoder(*model, options(GgmlType::kF16), file());
  EXPECT_EQ(GgufFile(file()).get<int64_t>("llama.context_length"), 100);
}

TEST_F(GgufExportTest, UnknownRotaryDivisorsAreRefused) {
  const auto model = decoder(decoder_config("llama", {{"rope_scaling",
                                                       {{"rope_type", "llama3"},
                                                        {"factor", 8.0},
                                                        {"low_freq_factor", 1.0},
                                                        {"high_freq_factor", 4.0},
                                                        {"original_max_position_embeddings", 64}}}}));
  save_gguf_decoder(*model, options(GgmlType::kF32), file());
  std::string bytes = read_file(file());
  const std::string key = "caldera.rope_parameters";
  bytes.replace(bytes.find(key), key.size(),
                "caldera.rope_parameterz");  // as if another program had written it
  write_file_atomic(file(), bytes);
  EXPECT_THAT(error_of<Error>([&] { open_gguf_decoder(file()); }),
              HasSubstr("not stretched by the rule of Llama 3.1"));
}

}  // namespace
}  // namespace caldera
