// Folders of weights that are not what they seem: absent, elsewhere, in part, of another kind.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "base/error.h"
#include "base/log.h"
#include "model/weights/checks.h"
#include "model/weights/inspect.h"
#include "model/weights/llava_config.h"
#include "model/weights/load.h"
#include "model/weights/mapped_model.h"
#include "model/weights/torch_pickle_write.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::AllOf;
using testing::HasSubstr;

const char* const kPointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n";

class WeightsChecksTest : public testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(tower());
    fs::create_directories(decoder());
    write_json(tower() / "config.json", tower_config_);
    write_json(decoder() / "config.json", decoder_config_);
    spec_.vision_tower = tower().string();
    spec_.language_model = decoder().string();
    spec_.seed = 7;
    model_ = build_llava(spec_);
  }
  fs::path tower() const { return folder_ / "tower"; }
  fs::path decoder() const { return folder_ / "decoder"; }

  // The model's tensors whose classic names begin with `part`, `from` replaced at the beginning.
  TensorList list(const std::string& part, const std::string& from, const std::string& to) {
    TensorList result;
    for (const NamedTensor& named : model_->tensors())
      if (named.name.starts_with(part))
        result.emplace_back(to + named.name.substr(from.size()), named.value());
    return result;
  }
  TensorList original_projector() {
    TensorList tensors;
    for (const auto& [name, value] : list("multi_modal_projector.", "multi_modal_projector.linear_", ""))
      tensors.emplace_back("model.mm_projector." + std::string(name[0] == '1' ? "0" : "2") + name.substr(1),
                           value);
    return tensors;
  }
  std::string refusal_of_build() {
    return error_of<CheckpointError>([&] { build_llava(spec_); });
  }
  fs::path write_llava(const Json& change = Json::object(), const TensorList& more = {}) {
    Json config = {{"model_type", "llava"},
                   {"vision_config", tower_config_},
                   {"text_config", decoder_config_},
                   {"vision_feature_select_strategy", "full"}};
    config.update(change);
    TensorList tensors = list("", "", "");
    tensors.insert(tensors.end(), more.begin(), more.end());
    fs::create_directories(folder_ / "llava");
    write_json(folder_ / "llava/config.json", config);
    write_weights_folder(folder_ / "llava", tensors);
    return folder_ / "llava";
  }
  Json original_config() {
    Json config = decoder_config_;
    config.update({{"model_type", "llava_llama"},
                   {"architectures", {"LlavaLlamaForCausalLM"}},
                   {"mm_projector_type", "mlp2x_gelu"},
                   {"mm_vision_tower", "../tower"}});
    return config;
  }

  TemporaryFolder temporary_;
  const fs::path folder_ = temporary_.path();
  Json tower_config_ = {{"model_type", "siglip_vision_model"},
                        {"hidden_size", 24},
                        {"intermediate_size", 40},
                        {"num_hidden_layers", 3},
                        {"num_attention_heads", 3},
                        {"image_size", 28},
                        {"patch_size", 7}};
  Json decoder_config_ = {{"model_type", "llama"},    {"hidden_size", 32},
                          {"intermediate_size", 48},  {"num_hidden_layers", 2},
                          {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                          {"vocab_size", 50},         {"max_position_embeddings", 64}};
  BuildSpec spec_;
  std::unique_ptr<LlavaModel> model_;
};

TEST_F(WeightsChecksTest, WeightsUnderOtherNamesAreNotTakenForNone) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"model-00001-of-00002.safetensors", "shards without their index: get model.safetensors.index.json"},
      {"pytorch_model-00001-of-00002.bin", "shards without their index"},
      {"consolidated.safetensors", "the format of the model's makers"},
      {"adapter_model.safetensors", "an adapter, not a model"},
      {"mm_projector.bin",
       "name the decoder that it was trained on, and this folder as model.pretrain_mm_mlp_adapter"},
      {"model-f16.gguf", "name the .gguf file itself"},
      {"weights.pth", "rename them so"}};
  for (const auto& [name, advice] : cases)
    for (const fs::path& folder : {tower(), decoder()}) {
      write_file_atomic(folder / name, "x");
      EXPECT_THAT(refusal_of_build(),
                  AllOf(HasSubstr(folder.string() + ": holds " + name), HasSubstr(advice)))
          << name;
      EXPECT_THAT(error_of<CheckpointError>([&] { open_weights_folder(folder); }), HasSubstr(advice)) << name;
      EXPECT_THAT(error_of<CheckpointError>([&] { inspect_model(folder); }), HasSubstr(advice)) << name;
      fs::remove(folder / name);
    }
  for (int i = 1; i < 6; ++i)
    write_file_atomic(decoder() / fmt::format("model-0000{}-of-00005.safetensors", i), "x");
  EXPECT_THAT(refusal_of_build(), HasSubstr("model-00003-of-00005.safetensors, ..., but nothing named"));
  for (int i = 1; i < 6; ++i) fs::remove(decoder() / fmt::format("model-0000{}-of-00005.safetensors", i));
  // What a training leaves beside the weights is none.
  for (const char* name : {"training_args.bin", "optimizer.pt", "rng_state_0.pth"})
    write_file_atomic(decoder() / name, "x");
  EXPECT_EQ(refusal_of_build(), "accepted");
}

TEST_F(WeightsChecksTest, PartsThatBeginAtRandomAreNamed) {
  using Names = std::vector<std::string>;
  EXPECT_EQ(random_parts(spec_), (Names{"vision_tower", "projector", "language_model"}));
  EXPECT_EQ(
      check_random_parts(spec_, {"projector", "language_model"}, {"vision_tower"}),
      "begins at random: vision_tower (" + tower().string() +
          " holds config.json and no weights); projector "
          "(model.pretrain_mm_mlp_adapter is not set, and no earlier stage trains it); language_model (" +
          decoder().string() + " holds config.json and no weights)");
  const auto refusal = [&](const Names& trainable, const Names& allowed) {
    return error_of<ConfigError>([&] { check_random_parts(spec_, trainable, allowed); });
  };
  EXPECT_THAT(refusal({"projector", "language_model"}, {}),
              AllOf(HasSubstr("the vision_tower begins at random (" + tower().string()),
                    HasSubstr("name it in model.random_parts: [vision_tower]")));
  EXPECT_THAT(refusal({"vision_tower", "language_model"}, {}), HasSubstr("the projector begins at random"));
  EXPECT_THAT(refusal({"vision_tower", "projector"}, {}), HasSubstr("the language_model begins at random"));
  spec_.lora = LoraConfig{};
  EXPECT_THAT(refusal({"vision_tower", "projector", "language_model"}, {}),
              HasSubstr("this stage does not train it but for low-rank adapters"));
  spec_.lora.reset();
  // An earlier stage's result, or weights, and they are not random.
  spec_.overlays = {{"earlier", {"projector", "vision_tower"}}};
  write_weights_folder(decoder(), list("language_model.", "language_model.", ""));
  EXPECT_EQ(random_parts(spec_), Names());
  EXPECT_EQ(check_random_parts(spec_, {}, {}), "");
}

TEST_F(WeightsChecksTest, AProjectorComesWholeOrNotAtAll) {
  const auto refusal = [&](const TensorList& tensors, const std::string& type) {
    write_torch_pickle(folder_ / "mm_projector.bin", tensors, at::kFloat);
    spec_.mm_projector_type = type;
    spec_.overlays = {{(folder_ / "mm_projector.bin").string(), {"projector"}}};
    return refusal_of_build();
  };
  const std::string file = (folder_ / "mm_projector.bin").string();
  TensorList whole = original_projector();
  EXPECT_EQ(refusal(whole, "mlp2x_gelu"), "accepted");
  EXPECT_EQ(refusal(whole, "mlp3x_gelu"),
            file +
                ": not a projector of type mlp3x_gelu: missing: multi_modal_projector.linear_3.weight, "
                "multi_modal_projector.linear_3.bias; left over: none. Set model.mm_projector_type to what "
                "the file holds, "
                "or name another file");
  EXPECT_THAT(
      refusal(whole, "linear"),
      AllOf(HasSubstr(file + ": not a projector of type linear"),
            HasSubstr("missing: none; left over: model.mm_projector.2.bias, model.mm_projector.2.weight")));
  TensorList part = whole;
  part.pop_back();
  EXPECT_THAT(refusal(part, "mlp2x_gelu"),
              HasSubstr("missing: multi_modal_projector.linear_2.bias; left over: none"));
  const TensorList linear = {{"model.mm_projector.weight", at::ones({32, 24})},
                             {"model.mm_projector.bias", at::ones({32})}};
  EXPECT_THAT(refusal(linear, "mlp2x_gelu"), HasSubstr("missing: multi_modal_projector.linear_2.weight"));
  TensorList more = whole;  // as LLaVA saves embeddings beside it
  more.emplace_back("model.embed_tokens.weight", at::ones({2, 32}));
  EXPECT_EQ(refusal(more, "mlp2x_gelu"), "accepted");
  // What ZeRO-3 leaves where nobody gathered.
  for (auto& [name, value] : whole) value = at::empty({0});
  EXPECT_THAT(
      refusal(whole, "mlp2x_gelu"),
      AllOf(HasSubstr("model.mm_projector.0.weight: expected shape [32, 24], got [0]"), HasSubstr("ZeRO-3")));
}

TEST_F(WeightsChecksTest, PointersOfGitLfsAreCalledThat) {
  write_weights_folder(decoder(), list("language_model.", "language_model.", ""));
  write_file_atomic(tower() / "model.safetensors", kPointer);
  EXPECT_EQ(refusal_of_build(),
            (tower() / "model.safetensors").string() +
                ": a pointer of Git LFS, not the file itself: fetch it with \"git lfs pull\" in its "
                "folder, or download it again");
  fs::rename(tower() / "model.safetensors", tower() / "pytorch_model.bin");
  EXPECT_THAT(refusal_of_build(), HasSubstr("pytorch_model.bin: a pointer of Git LFS"));
  fs::rename(tower() / "pytorch_model.bin", tower() / "model.safetensors.index.json");
  EXPECT_THAT(refusal_of_build(), HasSubstr("index.json: a pointer of Git LFS"));
  const fs::path whole = write_llava();  // what a training would refuse later, info refuses as well
  write_file_atomic(whole / "tokenizer.model", kPointer);
  EXPECT_THAT(error_of<CheckpointError>([&] { inspect_model(whole); }),
              HasSubstr("tokenizer.model: a pointer of Git LFS"));
  write_file_atomic(folder_ / "x.gguf", kPointer);
  EXPECT_THAT(error_of<CheckpointError>([&] { load_language_model(folder_ / "x.gguf"); }),
              HasSubstr("x.gguf: a pointer of Git LFS"));
}

TEST_F(WeightsChecksTest, QuantisedCheckpointsAreNamedByTheirMethod) {
  const std::vector<std::pair<Json, std::string>> cases = {
      {{{"quant_method", "bitsandbytes"}, {"load_in_4bit", true}, {"load_in_8bit", false}},
       "bitsandbytes (4 bits)"},
      {{{"load_in_8bit", true}}, "bitsandbytes (8 bits)"},
      {{{"quant_method", "gptq"}, {"bits", 4}}, "gptq (4 bits)"},
      {{{"quant_method", "awq"}, {"bits", 4}}, "awq (4 bits)"},
      {{{"quant_method", "compressed-tensors"}}, "compressed-tensors"},
      {{{"version", 1}}, "an unnamed method"}};
  for (const auto& [quantization, method] : cases) {
    const std::string message = "quantization_config: the weights are quantised by " + method;
    Json config = decoder_config_;
    config["quantization_config"] = quantization;
    write_json(decoder() / "config.json", config);
    EXPECT_THAT(refusal_of_build(), HasSubstr((decoder() / "config.json").string() + ": " + message));
    EXPECT_THAT(error_of<CheckpointError>([&] { inspect_model(decoder()); }), HasSubstr(message));
    EXPECT_THAT(error_of<CheckpointError>([&] {
                  load_llava(write_llava({{"quantization_config", quantization}}));
                }),
                HasSubstr(message));
    EXPECT_THAT(error_of<CheckpointError>([&] {
                  load_llava(write_llava({{"text_config", config}}));
                }),
                HasSubstr("text_config." + message));
  }
}

TEST_F(WeightsChecksTest, ValuesThatAreNotFiniteAreFoundAsTheyAreRead) {
  for (const at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16}) {
    TensorList tensors = list("language_model.", "language_model.", "");
    for (auto& [name, value] : tensors) value = value.to(dtype).clone();
    at::Tensor damaged = tensors[3].second;
    damaged[2][5] = std::numeric_limits<float>::quiet_NaN();
    damaged[4][1] = std::numeric_limits<float>::infinity();
    write_weights_folder(decoder(), tensors);
    EXPECT_THAT(refusal_of_build(),
                HasSubstr(fmt::format("{}: {}: 2 of {} values are not finite, the first (nan) at [2, 5]",
                                      (decoder() / "model.safetensors").string(), tensors[3].first,
                                      damaged.numel())));
  }
  const auto mapped = map_llava(write_llava());
  EXPECT_TRUE(mapped.has_value());
  model_->component_tensors("projector")[1].value().fill_(std::numeric_limits<float>::infinity());
  const auto damaged = map_llava(write_llava());
  EXPECT_THAT(
      error_of<CheckpointError>([&] {
        for (const NamedTensor& named : damaged->loaded.model->tensors()) damaged->values(named);
      }),
      HasSubstr(
          "multi_modal_projector.linear_1.bias: 32 of 32 values are not finite, the first (inf) at [0]"));
}

TEST_F(WeightsChecksTest, AHeadThatDiffersIsKeptWhateverTheFlagSays) {
  const at::Tensor head = model_->language->head_weight().clone();
  const fs::path folder = write_llava({{"tie_word_embeddings", true}});
  const LoadedModel loaded = load_llava(folder);
  EXPECT_TRUE(at::equal(loaded.model->language->head_weight(), head));
  EXPECT_EQ(loaded.model->language->config()["tie_word_embeddings"], false);
  EXPECT_TRUE(at::equal(load_language_model(folder)->head_weight(), head));
  const auto mapped = map_llava(folder);
  EXPECT_EQ(mapped->loaded.model->language->config()["tie_word_embeddings"], false);
  EXPECT_EQ(mapped->loaded.model->tensors().size(), model_->tensors().size());
  const ModelReport report = inspect_model(folder);
  EXPECT_TRUE(report.leftover.empty() &&
              report.missing == std::vector<std::string>{"tokenizer.model or tokenizer.json"});
  // The original's layout.
  Json config = original_config();
  config["tie_word_embeddings"] = true;
  TensorList tensors = list("language_model.", "language_model.", "");
  for (const auto& named : original_projector()) tensors.push_back(named);
  write_weights_folder(tower(), list("vision_tower.", "vision_tower.", ""));
  write_json(folder / "config.json", config);
  write_weights_folder(folder, tensors);
  EXPECT_TRUE(at::equal(load_llava(folder).model->language->head_weight(), head));
}

// As transformers reads a configuration of both: the older key wins where it says anything, and with it
// rope_theta's old place.
TEST_F(WeightsChecksTest, RopeScalingWinsOverRopeParameters) {
  const auto rope_of = [&](const Json& change) {
    Json config = decoder_config_;
    config.update(change);
    write_json(decoder() / "config.json", config);
    return Json(load_language_model(decoder(), 1)->config()["rope_parameters"]);
  };
  const Json scaling = {{"rope_type", "linear"}, {"factor", 4.0}};
  const Json parameters = {{"rope_theta", 500000.0}, {"rope_type", "default"}};
  EXPECT_EQ(rope_of({{"rope_parameters", parameters}}), parameters);
  const Json both = rope_of({{"rope_parameters", parameters}, {"rope_scaling", scaling}});
  EXPECT_EQ(both["rope_type"], "linear");
  EXPECT_EQ(both["factor"], 4.0);
  EXPECT_EQ(both["rope_theta"], 10000.0);
  EXPECT_EQ(rope_of({{"rope_parameters", parameters}, {"rope_scaling", nullptr}}), parameters);
  EXPECT_EQ(rope_of({{"rope_parameters", parameters}, {"rope_scaling", Json::object()}}), parameters);
}

TEST_F(WeightsChecksTest, ATowerMayLackWhatItsFeaturesDoNotNeed) {
  const auto without = [&](const std::vector<std::string>& parts, const std::string& from,
                           const std::string& to) {
    TensorList tensors = list("vision_tower.", from, to);
    std::erase_if(tensors, [&](const auto& named) {
      return std::any_of(parts.begin(), parts.end(), [&](const std::string& part) {
        return named.first.find(part) != std::string::npos;
      });
    });
    return tensors;
  };
  const std::string last = "encoder.layers.2.", head = "vision_model.head.";
  const auto load = [&](const VisionFeatures& features) {
    return error_of<CheckpointError>([&] { load_vision_tower(tower(), features); });
  };
  write_weights_folder(tower(), without({last, head}, "vision_tower.", ""));
  EXPECT_THAT(load({.vision_feature_layer = -1}),
              HasSubstr("vision_model.encoder.layers.2.self_attn.q_proj.weight"));
  write_weights_folder(tower(), without({"encoder.layers.2.mlp"}, "vision_tower.", ""));
  EXPECT_THAT(load({}), HasSubstr("4 of 64 tensors are missing"));  // a block in part is a damaged file
  write_weights_folder(tower(), without({last, head, "post_layernorm"}, "vision_tower.", ""));
  ASSERT_EQ(load({}), "accepted");
  const auto bare = load_vision_tower(tower(), {});
  const at::Tensor pixels = (at::arange(3 * 28 * 28) * 37 % 256).to(at::kByte).view({1, 3, 28, 28});
  EXPECT_TRUE(at::equal(bare->forward(pixels), model_->vision->forward(pixels)));
  EXPECT_TRUE(inspect_model(tower()).missing.empty());
  for (const NamedTensor& named :
       bare->tensors()) {  // whoever writes it on writes blocks that change nothing
    if (named.name.find(last) == std::string::npos) continue;
    const bool is_scale = named.name.find("norm") != std::string::npos && named.name.ends_with("weight");
    EXPECT_EQ(named.value().sum().item<float>(), is_scale ? 24 : 0) << named.name;
  }

  // In a whole model: HF's, mapped, and the original's, which takes the named tower's.
  TensorList others = list("multi_modal_projector.", "", "");
  for (const auto& named : list("language_model.", "", "")) others.push_back(named);
  const fs::path folder = write_llava();
  TensorList tensors = without({last, head}, "", "");
  tensors.insert(tensors.end(), others.begin(), others.end());
  write_weights_folder(folder, tensors);
  EXPECT_TRUE(at::equal(load_llava(folder).model->vision->forward(pixels), model_->vision->forward(pixels)));
  const auto mapped = map_llava(folder);
  for (const NamedTensor& named : mapped->loaded.model->tensors())
    EXPECT_TRUE(mapped->values(named).defined());
  write_weights_folder(tower(), list("vision_tower.", "vision_tower.", ""));
  write_json(folder / "config.json", original_config());
  tensors = without({last, head}, "", "model.vision_tower.");
  for (const auto& named : list("language_model.", "language_model.", "")) tensors.push_back(named);
  for (const auto& named : original_projector()) tensors.push_back(named);
  write_weights_folder(folder, tensors);
  const LoadedModel original = load_llava(folder);
  NamedTensors a = model_->tensors(), b = original.model->tensors();
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i].value(), b[i].value())) << a[i].name;
  EXPECT_TRUE(inspect_model(folder).missing == std::vector<std::string>{"tokenizer.model or tokenizer.json"});
}

TEST_F(WeightsChecksTest, LlavaNextsModelsOfQwenCallThemselvesLlava) {
  decoder_config_["model_type"] = "qwen2";
  write_json(decoder() / "config.json", decoder_config_);
  model_ = build_llava(spec_);
  write_weights_folder(tower(), list("vision_tower.", "vision_tower.", ""));
  Json config = original_config();
  config["model_type"] = "llava";
  config["architectures"] = {"LlavaQwenForCausalLM"};
  TensorList tensors = list("language_model.", "language_model.", "");
  for (const auto& named : original_projector()) tensors.push_back(named);
  fs::create_directories(folder_ / "llava");
  write_json(folder_ / "llava/config.json", config);
  write_weights_folder(folder_ / "llava", tensors);
  const LoadedModel loaded = load_llava(folder_ / "llava");
  EXPECT_STREQ(loaded.model->language->id(), "qwen2");
  NamedTensors a = model_->tensors(), b = loaded.model->tensors();
  ASSERT_EQ(a.size(), b.size());  // its biases among them
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i].value(), b[i].value())) << a[i].name;
  config["architectures"] = {"LlavaMptForCausalLM"};
  write_json(folder_ / "llava/config.json", config);
  EXPECT_THAT(error_of<CheckpointError>([&] { load_llava(folder_ / "llava"); }),
              HasSubstr("architectures: of the original LLaVA's classes, LlavaLlamaForCausalLM"));
}

TEST_F(WeightsChecksTest, ListsOfEndTokensSurviveAnExport) {
  write_json(decoder() / "config.json", decoder_config_);
  write_json(decoder() / "generation_config.json", {{"eos_token_id", {7, 9, 2}}});
  model_ = build_llava(spec_);
  const fs::path out = folder_ / "out", again = folder_ / "again", original = folder_ / "original";
  fs::create_directories(out);
  save_hf_llava(*model_, {}, {.image_token_id = 50, .eos_token_id = 11}, out);
  const Json expected = {7, 9, 2, 11};  // the tokenizer's own besides
  EXPECT_EQ(read_json(out / "generation_config.json")["eos_token_id"], expected);
  EXPECT_EQ(read_json(out / "config.json")["text_config"]["eos_token_id"], expected);
  fs::create_directories(again);
  save_hf_llava(*load_llava(out).model, {}, {.image_token_id = 50, .eos_token_id = 11}, again);
  EXPECT_EQ(read_json(again / "generation_config.json")["eos_token_id"], expected);
  // One token stays one.
  write_json(decoder() / "generation_config.json", {{"eos_token_id", 7}});
  save_hf_llava(*build_llava(spec_), {}, {.image_token_id = 50, .eos_token_id = 11}, again);
  EXPECT_EQ(read_json(again / "generation_config.json")["eos_token_id"], 11);
  write_json(decoder() / "generation_config.json", {{"eos_token_id", {7, "x"}}});
  EXPECT_THAT(refusal_of_build(),
              HasSubstr("generation_config.json: eos_token_id: expected ids of tokens, got [7,\"x\"]"));
}

TEST_F(WeightsChecksTest, OnlyFilesThatAreReadAreCounted) {
  const TensorList tensors = list("language_model.", "language_model.", "");
  write_weights_folder(decoder(), tensors, /*max_shard_bytes=*/10000);
  const size_t num_shards = weights_files(decoder()).size();
  EXPECT_GT(num_shards, 1u);
  for (const char* name : {"consolidated.safetensors", "pytorch_model.bin", "training_args.bin"})
    write_file_atomic(decoder() / name, "x");
  EXPECT_EQ(weights_files(decoder()).size(), num_shards);
  const auto facts = inspect_model(decoder()).facts;
  EXPECT_EQ(facts[0], (std::pair<std::string, std::string>{"weights files", std::to_string(num_shards)}));
  EXPECT_TRUE(weights_files(tower()).empty());
}

TEST_F(WeightsChecksTest, StageOneGoesOntoItsDecoder) {
  write_weights_folder(tower(), list("vision_tower.", "vision_tower.", ""));
  const fs::path folder = folder_ / "stage1";
  fs::create_directories(folder);
  write_json(folder / "config.json", original_config());
  write_torch_pickle(folder / "mm_projector.bin", original_projector(), at::kFloat);
  EXPECT_THAT(error_of<CheckpointError>([&] { load_llava(folder); }),
              AllOf(HasSubstr("holds the projector alone"), HasSubstr("--model-base")));
  EXPECT_THAT(error_of<CheckpointError>([&] { load_llava(folder, decoder()); }),
              HasSubstr("holds neither model.safetensors"));
  write_weights_folder(decoder(), list("language_model.", "language_model.", ""));
  const LoadedModel loaded = load_llava(folder, decoder());
  EXPECT_EQ(loaded.folder, decoder());
  NamedTensors a = model_->tensors(), b = loaded.model->tensors();
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i].value(), b[i].value())) << a[i].name;
  EXPECT_THAT(error_of<CheckpointError>([&] { load_language_model(folder, 1); }),
              HasSubstr("stage 1 leaves the projector alone"));
}

}  // namespace
}  // namespace caldera
