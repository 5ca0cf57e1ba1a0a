// `caldera model info`: every kind of folder is told apart, and what is missing or left over is named.
#include "model/weights/inspect.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/weights/gguf_export.h"
#include "model/weights/llava_export.h"
#include "model/weights/load.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

class InspectTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"clip", "llama", "out"}) fs::create_directories(root_ / name);
    write_json(root_ / "clip" / "config.json", {{"model_type", "clip_vision_model"},
                                                {"hidden_size", 32},
                                                {"intermediate_size", 64},
                                                {"num_hidden_layers", 4},
                                                {"num_attention_heads", 4},
                                                {"image_size", 28},
                                                {"patch_size", 7}});
    write_json(root_ / "llama" / "config.json", {{"model_type", "llama"},
                                                 {"hidden_size", 48},
                                                 {"intermediate_size", 96},
                                                 {"num_hidden_layers", 2},
                                                 {"num_attention_heads", 4},
                                                 {"num_key_value_heads", 2},
                                                 {"vocab_size", 100},
                                                 {"max_position_embeddings", 256}});
    model_ = build_llava(spec());
  }
  BuildSpec spec() const {
    BuildSpec spec;
    spec.vision_tower = (root_ / "clip").string();
    spec.language_model = (root_ / "llama").string();
    return spec;
  }
  void save(const fs::path& folder, at::ScalarType dtype = at::kBFloat16) const {
    save_hf_llava(*model_, {"v1", "pad", 0, {{"step", 3}}}, {.dtype = dtype, .image_token_id = 100}, folder);
    write_file_atomic(folder / "tokenizer.model", "x");  // only looked for
  }
  // The saved weights with changes: tensors of the saved file, edited by `edit`.
  void rewrite(const std::function<void(TensorList&)>& edit) const {
    TensorList tensors;
    {
      const auto source = open_weights_folder(out());
      for (const std::string& name : source->names()) tensors.emplace_back(name, source->read(name).clone());
    }
    edit(tensors);
    write_weights_folder(out(), tensors);
  }
  static std::string fact(const ModelReport& report, const std::string& key) {
    for (const auto& [name, value] : report.facts)
      if (name == key) return value;
    return "absent";
  }
  static std::vector<std::string> part_names(const ModelReport& report) {
    std::vector<std::string> names;
    for (const PartReport& part : report.parts) names.push_back(part.name);
    return names;
  }
  fs::path out() const { return root_ / "out"; }
  TemporaryFolder temporary_;
  const fs::path root_ = temporary_.path();
  std::unique_ptr<LlavaModel> model_;
};

TEST_F(InspectTest, ACompleteFolder) {
  save(out());
  const ModelReport report = inspect_model(out());
  EXPECT_THAT(report.kind, HasSubstr("Hugging Face LLaVA"));
  EXPECT_THAT(part_names(report), ElementsAre("vision_tower", "projector", "language_model"));
  EXPECT_THAT(report.missing, IsEmpty());
  EXPECT_THAT(report.leftover, IsEmpty());
  EXPECT_EQ(fact(report, "conversation template"), "v1");
  EXPECT_EQ(fact(report, "image_aspect_ratio"), "pad");
  EXPECT_EQ(report.provenance["step"], 3);
  EXPECT_THAT(report.parts[0].what,
              HasSubstr("clip: 4 blocks, 4 heads, width 32, pictures of 28 pixels -> 16 tokens"));
  EXPECT_THAT(report.parts[2].what,
              HasSubstr("llama: 2 layers, width 48, 4 heads of 12 (2 for keys), MLP 96, vocabulary 100"));
  EXPECT_EQ(report.parts[1].tensors.size(), 4u);
  EXPECT_EQ(report.parts[1].tensors[0].name, "multi_modal_projector.linear_1.weight");
  EXPECT_EQ(report.parts[1].tensors[0].dtype, "bf16");
  EXPECT_THAT(report.parts[1].tensors[0].shape, ElementsAre(48, 32));
  EXPECT_EQ(report.parts[1].tensors[0].num_bytes, 48 * 32 * 2);
  EXPECT_EQ(to_json(report)["parts"][2]["tensors"].size(),
            model_->component_tensors("language_model").size());
}

TEST_F(InspectTest, WhatIsMissingMisshapenOrLeftOverIsNamed) {
  save(out());
  rewrite([](TensorList& tensors) {
    std::erase_if(tensors,
                  [](const auto& item) { return item.first == "multi_modal_projector.linear_2.bias"; });
    for (auto& [name, tensor] : tensors)
      if (name == "language_model.model.norm.weight") tensor = at::ones({47});
    tensors.emplace_back("image_newline", at::ones({48}));
    tensors.emplace_back("vision_tower.vision_model.embeddings.position_ids", at::arange(17));
  });
  fs::remove(out() / "tokenizer.model");
  const ModelReport report = inspect_model(out());
  EXPECT_THAT(report.missing,
              ElementsAre("tokenizer.model or tokenizer.json", "multi_modal_projector.linear_2.bias",
                          "language_model.model.norm.weight: expected shape [48], got [47]"));
  EXPECT_THAT(report.leftover, ElementsAre("image_newline"));
  fs::remove(out() / "model.safetensors");
  EXPECT_THAT(inspect_model(out()).missing,
              ElementsAre("tokenizer.model or tokenizer.json", "model.safetensors"));
}

TEST_F(InspectTest, ComponentsAndSingleFiles) {
  save_hf_component(*model_, "vision_tower", at::kHalf, root_ / "clip");
  const ModelReport tower = inspect_model(root_ / "clip");
  EXPECT_EQ(tower.kind, "vision tower");
  EXPECT_THAT(tower.missing, IsEmpty());
  EXPECT_THAT(tower.leftover, IsEmpty());
  const ModelReport bare = inspect_model(root_ / "llama");
  EXPECT_EQ(bare.kind, "language model");
  EXPECT_THAT(bare.missing, ElementsAre("model.safetensors"));
  const ModelReport file = inspect_model(root_ / "clip" / "model.safetensors");
  EXPECT_EQ(file.kind, "weights file");
  EXPECT_EQ(file.parts[0].tensors.size(), model_->vision->tensors().size());
  EXPECT_EQ(file.parts[0].tensors[0].dtype, "f16");
}

TEST_F(InspectTest, TheOriginalLlava) {
  save_hf_component(*model_, "vision_tower", at::kFloat, root_ / "clip");
  save_original_llava(*model_, {"v1", "pad", 0, {}}, {.mm_vision_tower = (root_ / "clip").string()}, out());
  const ModelReport whole = inspect_model(out());
  EXPECT_EQ(whole.kind, "original LLaVA");
  EXPECT_THAT(part_names(whole), ElementsAre("vision_tower", "projector", "language_model"));
  EXPECT_THAT(whole.missing, ElementsAre("tokenizer.model or tokenizer.json"));
  EXPECT_THAT(whole.leftover, IsEmpty());

  fs::create_directories(root_ / "stage1");
  save_original_projector(*model_, {}, {.mm_vision_tower = "nowhere/clip"}, root_ / "stage1");
  const ModelReport projector = inspect_model(root_ / "stage1");
  EXPECT_EQ(projector.kind, "original LLaVA, stage 1 (projector alone)");
  EXPECT_EQ(fact(projector, "tower's folder"), "not here");
  EXPECT_EQ(projector.parts[0].tensors.size(), 4u);
  fs::remove(root_ / "stage1" / "config.json");
  EXPECT_EQ(inspect_model(root_ / "stage1").kind, "weights file");
}

TEST_F(InspectTest, GgufFiles) {
  const GgufExportOptions options = {
      .type = GgmlType::kF16,
      .general = {{"general.name", std::string("small")},
                  {"caldera.card", std::string(R"({"provenance":{"step":7}})")}},
      .tokenizer = {},
      .image_aspect_ratio = "pad"};
  save_gguf_decoder(*model_->language, options, out() / "model.gguf");
  save_gguf_mmproj(*model_, options, out() / "mmproj.gguf");
  const ModelReport folder = inspect_model(out());
  EXPECT_EQ(folder.kind, "folder of GGUF files");
  EXPECT_THAT(part_names(folder),
              ElementsAre("mmproj.gguf: vision_tower and projector", "model.gguf: language_model"));
  EXPECT_THAT(folder.parts[0].what, HasSubstr("clip: 3 blocks, width 32"));
  EXPECT_EQ(fact(folder, "model.gguf: general.name"), "small");
  EXPECT_EQ(folder.provenance["step"], 7);
  EXPECT_EQ(inspect_model(out() / "model.gguf").parts[0].tensors[0].dtype, "f16");
}

TEST_F(InspectTest, AStepsCheckpointAndARun) {
  const fs::path step = root_ / "run" / "pretrain" / "checkpoints" / "step-00000100";
  fs::create_directories(step);
  TensorList projector;
  for (const NamedTensor& named : model_->component_tensors("projector"))
    projector.emplace_back(named.name, named.value());
  write_safetensors(step / "model.safetensors", projector);
  BuildSpec build = spec();
  build.overlays.push_back({"/nowhere/earlier", {"projector"}});
  write_json(step / "caldera.json",
             {{"build", to_json(build)}, {"card", to_json(ModelCard{"plain", "pad", 100, {}})}});
  write_json(step / "manifest.json", Json::object());
  const ModelReport report = inspect_model(root_ / "run");
  EXPECT_EQ(report.path, step);
  EXPECT_EQ(report.kind, "step checkpoint");
  EXPECT_EQ(fact(report, "projector"), "mlp2x_gelu");
  EXPECT_THAT(report.missing, ElementsAre("/nowhere/earlier", "optimizer.safetensors", "trainer_state.json"));
  EXPECT_EQ(report.parts[0].tensors.size(), 4u);
  EXPECT_THROW(inspect_model(root_ / "nowhere"), CheckpointError);
  EXPECT_THROW(inspect_model(out()), CheckpointError);  // empty
}

}  // namespace
}  // namespace caldera
