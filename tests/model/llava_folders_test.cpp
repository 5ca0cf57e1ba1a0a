// Whole LLaVA folders as others write them: HF's of every age, the original LLaVA's, and parts of them. What
// they compute is compared with transformers by tests/parity/folders.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.h"
#include "model/weights/llava_config.h"
#include "model/weights/load.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

const Json kTower = {{"model_type", "clip_vision_model"},
                     {"hidden_size", 24},
                     {"intermediate_size", 40},
                     {"num_hidden_layers", 3},
                     {"num_attention_heads", 3},
                     {"image_size", 30},
                     {"patch_size", 7}};
const Json kDecoder = {{"model_type", "llama"},    {"hidden_size", 32},
                       {"intermediate_size", 48},  {"num_hidden_layers", 2},
                       {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                       {"vocab_size", 50},         {"max_position_embeddings", 64}};

class LlavaFoldersTest : public testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(folder_ / "tower");
    fs::create_directories(folder_ / "decoder");
    write_json(folder_ / "tower/config.json", kTower);
    write_json(folder_ / "decoder/config.json", kDecoder);
    BuildSpec spec;
    spec.vision_tower = (folder_ / "tower").string();
    spec.language_model = (folder_ / "decoder").string();
    spec.seed = 7;
    model_ = build_llava(spec);
    write_weights_folder(folder_ / "tower", list("vision_tower.", "vision_tower.", ""));
  }

  // The model's tensors whose classic names begin with `part`, with `from` at their beginning replaced.
  TensorList list(const std::string& part, const std::string& from, const std::string& to) {
    TensorList result;
    for (const NamedTensor& named : model_->tensors())
      if (named.name.starts_with(part)) {
        CALDERA_ASSERT(named.name.starts_with(from));
        result.emplace_back(to + named.name.substr(from.size()), named.value());
      }
    return result;
  }
  static void join(TensorList& all, TensorList more) { all.insert(all.end(), more.begin(), more.end()); }

  static Json original_config() {
    Json config = kDecoder;
    config.update({{"architectures", {"LlavaLlamaForCausalLM"}},
                   {"model_type", "llava_llama"},
                   {"image_aspect_ratio", "pad"},
                   {"mm_projector_type", "mlp2x_gelu"},
                   {"mm_use_im_start_end", false},
                   {"mm_vision_select_feature", "patch"},
                   {"mm_vision_select_layer", -2},
                   {"mm_vision_tower", "../tower"}});
    return config;
  }
  TensorList original_tensors() {
    TensorList tensors = list("language_model.", "language_model.", "");
    for (auto& [name, value] : list("multi_modal_projector.", "multi_modal_projector.", "")) {
      const std::string field = name.substr(std::string("linear_1").size());
      tensors.emplace_back(
          (name.starts_with("linear_1") ? "model.mm_projector.0" : "model.mm_projector.2") + field, value);
    }
    return tensors;
  }
  fs::path write(const TensorList& tensors, const Json& config) {
    fs::remove_all(folder_ / "llava");
    fs::create_directories(folder_ / "llava");
    write_json(folder_ / "llava/config.json", config);
    write_weights_folder(folder_ / "llava", tensors);
    return folder_ / "llava";
  }
  void expect_equal(LlavaModel& other) {
    NamedTensors a = model_->tensors(), b = other.tensors();
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i].value(), b[i].value())) << a[i].name;
  }
  std::string refusal(const Json& change) {
    Json config = original_config();
    config.update(change);
    try {
      load_llava(write(original_tensors(), config));
    } catch (const CheckpointError& error) {
      return error.what();
    }
    return "accepted";
  }

  TemporaryFolder temporary_;
  const fs::path folder_ = temporary_.path();
  std::unique_ptr<LlavaModel> model_;
};

TEST_F(LlavaFoldersTest, OriginalWithItsTowerBeside) {
  TensorList tensors = original_tensors();
  tensors.emplace_back("model.layers.0.self_attn.rotary_emb.inv_freq", at::ones({4}));
  tensors.emplace_back("model.image_newline", at::ones({32}));
  const fs::path folder = write(tensors, original_config());
  const LoadedModel loaded = load_llava(folder);
  expect_equal(*loaded.model);
  EXPECT_EQ(loaded.card.image_aspect_ratio, "pad");
  EXPECT_EQ(loaded.model->mm_projector_type, "mlp2x_gelu");
  EXPECT_EQ(loaded.model->features.vision_feature_layer, -2);
  EXPECT_EQ(read_model_card(folder).image_aspect_ratio, "pad");
  EXPECT_EQ(read_image_spec(folder)->num_image_tokens, 16);
}

TEST_F(LlavaFoldersTest, OriginalThatHoldsItsTower) {
  for (const char* prefix :
       {"model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower."}) {
    TensorList tensors = original_tensors();
    join(tensors, list("vision_tower.", "vision_tower.vision_model.", prefix));
    TensorList others;  // the named tower's weights do not count
    for (const auto& [name, value] : list("vision_tower.", "vision_tower.", ""))
      others.emplace_back(name, at::zeros_like(value));
    write_weights_folder(folder_ / "tower", others);
    expect_equal(*load_llava(write(tensors, original_config())).model);
  }
}

TEST_F(LlavaFoldersTest, OriginalWithItsTowerInTheCache) {
  const fs::path model = folder_ / "cache/models--some--tower";
  fs::create_directories(model / "refs");
  fs::create_directories(model / "snapshots");
  fs::rename(folder_ / "tower", model / "snapshots/0123");
  write_file_atomic(model / "refs/main", "0123\n");
  ::setenv("HF_HUB_CACHE", (folder_ / "cache").c_str(), 1);
  EXPECT_EQ(refusal({{"mm_vision_tower", "some/tower"}}), "accepted");
  expect_equal(*load_llava(folder_ / "llava").model);
  EXPECT_THAT(refusal({{"mm_vision_tower", "some/other"}}),
              HasSubstr("mm_vision_tower \"some/other\" is no folder beside it or here, nor in HF's cache"));
  EXPECT_FALSE(read_image_spec(folder_ / "llava").has_value());
  write_file_atomic(model / "refs/main", "../0123");
  EXPECT_THAT(refusal({{"mm_vision_tower", "some/tower"}}), HasSubstr("is no folder"));
  ::unsetenv("HF_HUB_CACHE");
}

TEST_F(LlavaFoldersTest, OriginalOfAnotherKindIsRefused) {
  EXPECT_EQ(refusal(Json::object()), "accepted");
  EXPECT_EQ(
      refusal({{"model_type", "llava"}, {"image_aspect_ratio", nullptr}, {"mm_patch_merge_type", "flat"}}),
      "accepted");
  EXPECT_THAT(refusal({{"model_type", "llava_mpt"}}), HasSubstr("model_type \"llava_mpt\""));
  EXPECT_THAT(refusal({{"mm_use_im_start_end", true}}), HasSubstr("<im_start>"));
  EXPECT_THAT(refusal({{"mm_patch_merge_type", "spatial_unpad"}}), HasSubstr("several tiles a picture"));
  EXPECT_THAT(refusal({{"image_aspect_ratio", "anyres"}}),
              HasSubstr("image_aspect_ratio: expected square or pad, got anyres"));
  EXPECT_THAT(refusal({{"mm_projector_type", "linear"}}), HasSubstr("model.mm_projector.2"));
  EXPECT_THAT(refusal({{"mm_projector_type", "mlp3x_gelu"}}), HasSubstr("linear_3"));
}

TEST_F(LlavaFoldersTest, EveryAgeOfHf) {
  const Json config = {{"model_type", "llava"}, {"vision_config", kTower}, {"text_config", kDecoder}};
  const std::vector<std::array<const char*, 3>> layouts = {
      {"vision_tower.vision_model.", "language_model.model.", "multi_modal_projector."},              // 4.x
      {"model.vision_tower.vision_model.", "model.language_model.", "model.multi_modal_projector."},  // 4.52
      {"model.vision_tower.", "model.language_model.", "model.multi_modal_projector."},  // 5.x, in memory
      {"vision_tower.", "language_model.model.", "multi_modal_projector."}};             // 5.17, fresh
  for (const auto& [vision, text, projector] : layouts) {
    TensorList tensors = list("vision_tower.", "vision_tower.vision_model.", vision);
    join(tensors, list("language_model.model.", "language_model.model.", text));
    join(tensors, list("multi_modal_projector.", "multi_modal_projector.", projector));
    const bool classic = std::string(text) == "language_model.model.";
    join(tensors, list("language_model.lm_head.", "language_model.", classic ? "language_model." : ""));
    const fs::path folder = write(tensors, config);
    expect_equal(*load_llava(folder).model);
    // Such a folder gives each of its parts, too.
    BuildSpec spec;
    spec.vision_tower = spec.language_model = folder.string();
    spec.overlays = {{folder.string(), {"projector"}}};
    expect_equal(*build_llava(spec));
  }
}

// llava-hf/llava-1.5-7b-hf: of the decoder, transformers 4 wrote what differs from its class alone.
TEST_F(LlavaFoldersTest, SizesThatTransformersLeftOutAreItsClasses) {
  const auto text_of = [](const Json& text) { return hf_text_config({{"text_config", text}}, "config.json"); };
  const Json vicuna = text_of({{"_name_or_path", "lmsys/vicuna-7b-v1.5"},
                               {"architectures", {"LlamaForCausalLM"}},
                               {"max_position_embeddings", 4096},
                               {"model_type", "llama"},
                               {"rms_norm_eps", 1e-5},
                               {"vocab_size", 32064}});
  EXPECT_EQ(vicuna["hidden_size"], 4096);
  EXPECT_EQ(vicuna["intermediate_size"], 11008);
  EXPECT_EQ(vicuna["num_hidden_layers"], 32);
  EXPECT_EQ(vicuna["num_attention_heads"], 32);
  EXPECT_EQ(vicuna["vocab_size"], 32064);
  EXPECT_EQ(text_of(Json::object())["model_type"], "llama");
  EXPECT_EQ(text_of({{"model_type", "mistral"}})["intermediate_size"], 14336);
  EXPECT_EQ(text_of({{"model_type", "qwen2"}, {"hidden_size", 896}})["hidden_size"], 896);
  EXPECT_EQ(text_of({{"model_type", "qwen3"}})["vocab_size"], 151936);
  EXPECT_THROW(hf_text_config({{"text_config", 1}}, "config.json"), CheckpointError);
  // A decoder's own file says its sizes; there a missing one is a mistake.
  Json decoder = kDecoder;
  decoder.erase("hidden_size");
  write_json(folder_ / "decoder/config.json", decoder);
  EXPECT_THROW(load_language_model(folder_ / "decoder", 1), CheckpointError);
}

TEST_F(LlavaFoldersTest, AProcessorThatPadsSaysSo) {
  TensorList tensors = list("", "", "");
  const fs::path folder =
      write(tensors, {{"model_type", "llava"}, {"vision_config", kTower}, {"text_config", kDecoder}});
  EXPECT_EQ(load_llava(folder).card.image_aspect_ratio, "square");
  write_json(folder / "preprocessor_config.json", {{"do_pad", true}});
  EXPECT_EQ(load_llava(folder).card.image_aspect_ratio, "pad");
}

TEST_F(LlavaFoldersTest, SiglipNeedsAllItsPatches) {
  Json tower = kTower;
  tower["model_type"] = "siglip_vision_model";
  write_json(folder_ / "tower/config.json", tower);
  fs::remove(folder_ / "tower/model.safetensors");
  BuildSpec spec;
  spec.vision_tower = (folder_ / "tower").string();
  spec.language_model = (folder_ / "decoder").string();
  model_ = build_llava(spec);
  Json config = {{"model_type", "llava"}, {"vision_config", tower}, {"text_config", kDecoder}};
  config["vision_feature_select_strategy"] = "full";
  const fs::path folder = write(list("", "", ""), config);
  expect_equal(*load_llava(folder).model);
  // As exported it says so itself.
  save_hf_llava(*model_, {}, {.image_token_id = 50}, folder);
  EXPECT_EQ(read_json(folder / "config.json")["vision_feature_select_strategy"], "full");
  EXPECT_EQ(read_json(folder / "processor_config.json")["num_additional_image_tokens"], 0);
  EXPECT_EQ(read_json(folder / "preprocessor_config.json")["image_processor_type"], "SiglipImageProcessor");
  // SigLIP's own processor does not pad.
  save_hf_llava(*model_, {"v1", "pad", 0, {}}, {.image_token_id = 50}, folder);
  const Json padding = read_json(folder / "preprocessor_config.json");
  EXPECT_EQ(padding["image_processor_type"], "LlavaImageProcessor");
  EXPECT_EQ(padding["do_pad"], true);
  EXPECT_EQ(padding["do_center_crop"], false);
  EXPECT_TRUE(padding["size"].contains("height"));
  config.erase("vision_feature_select_strategy");
  write_json(folder / "config.json", config);
  try {
    load_llava(folder);
    FAIL();
  } catch (const CheckpointError& error) {
    EXPECT_THAT(error.what(), HasSubstr("default would drop the first patch"));
  }
}

TEST_F(LlavaFoldersTest, ProjectorsOfTheOriginal) {
  BuildSpec spec;
  spec.vision_tower = (folder_ / "tower").string();
  spec.language_model = (folder_ / "decoder").string();
  spec.seed = 8;
  for (const char* prefix :
       {"model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."}) {
    TensorList tensors;
    for (const auto& [name, value] : list("multi_modal_projector.", "multi_modal_projector.linear_", ""))
      tensors.emplace_back(prefix + std::string(name.starts_with("1") ? "0" : "2") + name.substr(1), value);
    write_safetensors(folder_ / "mm_projector.safetensors", tensors);
    spec.overlays = {{(folder_ / "mm_projector.safetensors").string(), {"projector"}}};
    const auto built = build_llava(spec);
    const NamedTensors a = model_->component_tensors("projector"), b = built->component_tensors("projector");
    for (size_t i = 0; i < a.size(); ++i)
      EXPECT_TRUE(at::equal(a[i].value(), b[i].value())) << prefix << a[i].name;
  }
  // Of v1: one linear layer, whose name has no number.
  spec.mm_projector_type = "linear";
  const TensorList linear = {{"model.mm_projector.weight", at::full({32, 24}, 2.0)},
                             {"model.mm_projector.bias", at::ones({32})}};
  write_safetensors(folder_ / "mm_projector.safetensors", linear);
  EXPECT_TRUE(at::equal(build_llava(spec)->component_tensors("projector")[0].value(), linear[0].second));
}

TEST_F(LlavaFoldersTest, PicturesOfAnotherSize) {
  BuildSpec spec;
  spec.vision_tower = (folder_ / "tower").string();
  spec.language_model = (folder_ / "decoder").string();
  spec.image_size = 49;
  EXPECT_EQ(build_spec_from_json(to_json(spec), "x").image_size, 49);
  const auto built = build_llava(spec);
  EXPECT_EQ(built->image_spec().num_image_tokens, 49);
  fs::create_directories(folder_ / "step");
  write_json(folder_ / "step/caldera.json", {{"build", to_json(spec)}});
  EXPECT_EQ(read_image_spec(folder_ / "step")->num_image_tokens, 49);
  fs::create_directories(folder_ / "out");
  save_hf_llava(*built, {}, {.image_token_id = 50}, folder_ / "out");
  EXPECT_EQ(read_json(folder_ / "out/config.json")["vision_config"]["image_size"], 49);
  EXPECT_EQ(read_image_spec(folder_ / "out")->num_image_tokens, 49);
  EXPECT_EQ(load_llava(folder_ / "out").model->image_spec().image_size, 49);
}

TEST_F(LlavaFoldersTest, ATowerFromTheOriginalIsItsOwnFolder) {
  const fs::path folder = write(original_tensors(), original_config());
  EXPECT_EQ(load_language_model(folder)->hidden_size(), 32);
  try {
    load_vision_tower(folder, {});
    FAIL();
  } catch (const CheckpointError& error) {
    EXPECT_THAT(error.what(), HasSubstr("use that tower's own folder"));
  }
}

}  // namespace
}  // namespace caldera
