// Whole models: built from parts, written as HF folders, found again in a run's folders.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.h"
#include "base/log.h"
#include "model/weights/load.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

class ExportTest : public testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(root_ / "clip");
    fs::create_directories(root_ / "llama");
    fs::create_directories(root_ / "out");
    write_json(root_ / "clip" / "config.json", {{"model_type", "clip_vision_model"},
                                                {"hidden_size", 32},
                                                {"intermediate_size", 64},
                                                {"num_hidden_layers", 4},
                                                {"num_attention_heads", 4},
                                                {"image_size", 28},
                                                {"patch_size", 7}});
    write_llama({});
  }

  void write_llama(const Json& change) const {
    Json config = {{"model_type", "llama"},    {"hidden_size", 48},
                   {"intermediate_size", 96},  {"num_hidden_layers", 2},
                   {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                   {"vocab_size", 100},        {"max_position_embeddings", 256},
                   {"rms_norm_eps", 1e-5},     {"rope_theta", 10000.0}};
    if (!change.is_null()) config.update(change);
    write_json(root_ / "llama" / "config.json", config);
  }
  BuildSpec spec() const {
    BuildSpec spec;
    spec.vision_tower = (root_ / "clip").string();
    spec.language_model = (root_ / "llama").string();
    spec.seed = 11;
    return spec;
  }
  fs::path out() const { return root_ / "out"; }
  static ExportOptions options(int64_t image_token_id = 100, at::ScalarType dtype = at::kFloat) {
    ExportOptions options;
    options.dtype = dtype;
    options.image_token_id = image_token_id;
    return options;
  }
  // Makes every tensor different from what the seed gives.
  static void disturb(LlavaModel& model) {
    for (NamedTensor& named : model.tensors()) {
      at::Tensor value = named.value();
      value.add_(0.01);
    }
  }
  static void expect_equal(const NamedTensors& a, const NamedTensors& b) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) {
      EXPECT_EQ(a[i].name, b[i].name);
      EXPECT_TRUE(at::equal(a[i].value(), b[i].value())) << a[i].name;
    }
  }
  static TensorList list(const NamedTensors& tensors) {
    TensorList result;
    for (const NamedTensor& named : tensors) result.emplace_back(named.name, named.value());
    return result;
  }
  void write_step(const fs::path& folder, LlavaModel& model, const std::string& component,
                  bool finished = true) const {
    fs::create_directories(folder);
    write_safetensors(folder / "model.safetensors", list(model.component_tensors(component)));
    write_json(folder / "caldera.json",
               {{"build", to_json(spec())}, {"card", to_json(ModelCard{"v1", "pad", 100, Json::object()})}});
    if (finished) write_json(folder / "manifest.json", Json::object());
  }

  TemporaryFolder temporary_;
  const fs::path root_ = temporary_.path();
};

TEST_F(ExportTest, SavedModelLoadsTheSame) {
  const auto model = build_llava(spec());
  disturb(*model);
  save_hf_llava(*model, {"v1", "pad", 0, {{"step", 3}}}, options(/*image_token_id=*/40), out());
  const LoadedModel loaded = load_llava(out());
  expect_equal(model->tensors(), loaded.model->tensors());
  EXPECT_EQ(loaded.folder, out());
  EXPECT_EQ(loaded.card.conversation_template, "v1");
  EXPECT_EQ(loaded.card.image_aspect_ratio, "pad");
  EXPECT_EQ(loaded.card.vocab_size, 100);
  EXPECT_EQ(loaded.card.provenance["step"], 3);
  EXPECT_EQ(loaded.model->mm_projector_type, "mlp2x_gelu");
  EXPECT_EQ(loaded.model->features.vision_feature_layer, -2);
}

TEST_F(ExportTest, WritesTheKeysOthersRead) {
  const auto model = build_llava(spec());
  save_hf_llava(*model, {"v1", "pad", 0, {}}, options(40), out());
  const Json config = read_json(out() / "config.json");
  EXPECT_EQ(config["architectures"], Json({"LlavaForConditionalGeneration"}));
  EXPECT_EQ(config["model_type"], "llava");
  EXPECT_EQ(config["image_token_index"], 40);
  EXPECT_EQ(config["image_seq_length"], 16);
  EXPECT_EQ(config["vision_feature_layer"], -2);
  EXPECT_EQ(config["vision_feature_select_strategy"], "default");
  EXPECT_EQ(config["projector_hidden_act"], "gelu");
  EXPECT_EQ(config["multimodal_projector_bias"], true);
  EXPECT_EQ(config["text_config"]["model_type"], "llama");
  EXPECT_EQ(config["text_config"]["vocab_size"], 100);
  EXPECT_EQ(config["vision_config"]["model_type"], "clip_vision_model");
  EXPECT_EQ(config["torch_dtype"], "float32");
  const Json processor = read_json(out() / "processor_config.json");
  EXPECT_EQ(processor["num_additional_image_tokens"], 1);
  EXPECT_EQ(processor["patch_size"], 7);
  EXPECT_EQ(processor["image_processor"]["do_pad"], true);
  const Json preprocessor = read_json(out() / "preprocessor_config.json");
  EXPECT_EQ(preprocessor["image_processor_type"], "LlavaImageProcessor");
  EXPECT_EQ(preprocessor["crop_size"]["height"], 28);
  EXPECT_EQ(preprocessor["resample"], 3);
  EXPECT_EQ(read_json(out() / "generation_config.json")["eos_token_id"], 2);
  const auto source = open_weights_folder(out());
  for (const char* name :
       {"language_model.model.embed_tokens.weight", "language_model.model.layers.1.self_attn.k_proj.weight",
        "language_model.lm_head.weight", "multi_modal_projector.linear_1.bias",
        "multi_modal_projector.linear_2.weight", "vision_tower.vision_model.pre_layrnorm.weight",
        "vision_tower.vision_model.post_layernorm.bias"})
    EXPECT_TRUE(source->has(name)) << name;
  EXPECT_EQ(safetensors_metadata(out() / "model.safetensors").at("format"), "pt");
}

TEST_F(ExportTest, IdsThatATokenizerDoesNotHaveAreNotWritten) {
  const auto model = build_llava(spec());
  ExportOptions qwen = options(40);
  qwen.bos_token_id = qwen.pad_token_id = -1;
  save_hf_llava(*model, {}, qwen, out());
  const Json config = read_json(out() / "config.json"), generation = read_json(out() / "generation_config.json");
  EXPECT_EQ(generation["eos_token_id"], 2);
  for (const Json& json : {generation, config, Json(config["text_config"])}) {
    EXPECT_FALSE(json.contains("bos_token_id"));
    EXPECT_FALSE(json.contains("pad_token_id"));
  }
}

TEST_F(ExportTest, VocabularyIsPaddedAndCutBack) {
  const auto model = build_llava(spec());
  disturb(*model);
  save_hf_llava(*model, {"plain", "square", 0, {}}, options(100), out());
  EXPECT_EQ(read_json(out() / "config.json")["text_config"]["vocab_size"], 128);
  // Rows beyond the trained ones only give the placeholder's id a place: each the mean of the others.
  const at::Tensor head = open_weights_folder(out())->read("language_model.lm_head.weight");
  const at::Tensor trained = model->language->head_weight();
  EXPECT_EQ(head.size(0), 128);
  EXPECT_TRUE(at::equal(head.narrow(0, 0, 100), trained));
  EXPECT_TRUE(at::allclose(head[127], trained.mean(0)));
  // Reading takes them off again: no softmax of ours runs over them.
  const LoadedModel loaded = load_llava(out());
  EXPECT_EQ(loaded.card.vocab_size, 100);
  expect_equal(loaded.model->tensors(), model->tensors());
  // Without our card the file is taken as it is.
  const std::string card = read_file(out() / "caldera.json");
  fs::remove(out() / "caldera.json");
  EXPECT_EQ(load_llava(out()).model->language->vocab_size(), 128);
  write_file_atomic(out() / "caldera.json", card);

  // Laid over the base model again, only the trained rows are taken.
  BuildSpec next = spec();
  next.overlays = {{out().string(), {"projector", "language_model"}}};
  const auto rebuilt = build_llava(next);
  expect_equal(rebuilt->component_tensors("language_model"), model->component_tensors("language_model"));
  expect_equal(rebuilt->component_tensors("projector"), model->component_tensors("projector"));
  // The tower was not asked for: it is the base model's.
  expect_equal(rebuilt->component_tensors("vision_tower"),
               build_llava(spec())->component_tensors("vision_tower"));
}

TEST_F(ExportTest, OverlaysAreCheckedToo) {
  const auto model = build_llava(spec());
  write_safetensors(out() / "a.safetensors", {{"something", at::ones({1})}});
  BuildSpec next = spec();
  next.overlays = {{(out() / "a.safetensors").string(), {"projector"}}};
  EXPECT_THAT(error_of<CheckpointError>([&] { build_llava(next); }),
              HasSubstr("a.safetensors: holds no tensor of projector"));
  const std::string layer = "multi_modal_projector.linear_";
  write_safetensors(out() / "a.safetensors", {{layer + "1.weight", at::ones({48, 31})},
                                              {layer + "1.bias", at::ones({48})},
                                              {layer + "2.weight", at::ones({48, 48})},
                                              {layer + "2.bias", at::ones({48})}});
  EXPECT_THAT(error_of<CheckpointError>([&] { build_llava(next); }),
              HasSubstr("linear_1.weight: expected shape [48, 32], got [48, 31]"));
}

TEST_F(ExportTest, HalfPrecisionOnDisk) {
  const auto model = build_llava(spec());
  save_hf_llava(*model, {}, options(40, at::kBFloat16), out());
  EXPECT_EQ(read_json(out() / "config.json")["dtype"], "bfloat16");
  EXPECT_EQ(open_weights_folder(out())->read("language_model.lm_head.weight").scalar_type(), at::kBFloat16);
  const LoadedModel loaded = load_llava(out());
  EXPECT_EQ(loaded.model->dtype(), at::kFloat);
  EXPECT_TRUE(at::equal(loaded.model->language->head_weight(),
                        model->language->head_weight().to(at::kBFloat16).to(at::kFloat)));
}

TEST_F(ExportTest, TiedHeadIsWrittenOnce) {
  write_llama({{"tie_word_embeddings", true}});
  const auto model = build_llava(spec());
  save_hf_llava(*model, {}, options(), out());
  EXPECT_FALSE(open_weights_folder(out())->has("language_model.lm_head.weight"));
  EXPECT_EQ(read_json(out() / "config.json")["tie_word_embeddings"], true);
  expect_equal(load_llava(out()).model->tensors(), model->tensors());
}

TEST_F(ExportTest, ReadsNamesOfTransformers5) {
  const auto model = build_llava(spec());
  disturb(*model);
  save_hf_llava(*model, {}, options(40), out());
  const std::vector<std::vector<std::pair<std::string, std::string>>> layouts = {
      {{"language_model.model.", "model.language_model."},
       {"language_model.lm_head.", "lm_head."},
       {"multi_modal_projector.", "model.multi_modal_projector."},
       {"vision_tower.vision_model.", "model.vision_tower."}},
      {{"vision_tower.vision_model.", "vision_tower."}},
      {{"language_model.model.", "model.language_model."},
       {"language_model.lm_head.", "lm_head."},
       {"multi_modal_projector.", "model.multi_modal_projector."},
       {"vision_tower.vision_model.", "model.vision_tower.vision_model."}}};
  for (const auto& layout : layouts) {
    TensorList tensors = list(model->tensors());
    for (auto& [name, value] : tensors)
      for (const auto& [from, to] : layout)
        if (name.starts_with(from)) {
          name = to + name.substr(from.size());
          break;
        }
    write_weights_folder(out(), tensors);
    expect_equal(load_llava(out()).model->tensors(), model->tensors());
  }
}

TEST_F(ExportTest, WhatHfCannotHoldIsOurs) {
  std::vector<std::string> warnings;
  LogSink before = set_log_sink([&](LogLevel level, const std::string& line) {
    if (level == LogLevel::kWarning) warnings.push_back(line);
  });
  BuildSpec linear = spec();
  linear.mm_projector_type = "linear";
  linear.features.vision_feature_select_strategy = "cls_patch";
  const auto model = build_llava(linear);
  save_hf_llava(*model, {}, options(40), out());
  set_log_sink(before);
  ASSERT_EQ(warnings.size(), 1u);
  EXPECT_THAT(warnings[0], HasSubstr("cannot hold a clip tower with a linear projector"));
  EXPECT_EQ(read_json(out() / "config.json")["model_type"], "caldera_llava");
  EXPECT_EQ(read_json(out() / "config.json")["architectures"][0], "CalderaLlava");
  const LoadedModel loaded = load_llava(out());
  EXPECT_EQ(loaded.model->mm_projector_type, "linear");
  EXPECT_EQ(loaded.model->image_spec().num_image_tokens, 17);
  expect_equal(loaded.model->tensors(), model->tensors());
}

TEST_F(ExportTest, ModelWithAConvolutionalTower) {
  LogSink before = set_log_sink([](LogLevel, const std::string&) {});
  fs::create_directories(root_ / "cnn");
  write_json(root_ / "cnn" / "config.json", {{"model_type", "efficientnet_lite"}, {"image_size", 64}});
  write_json(root_ / "cnn" / "preprocessor_config.json",
             {{"image_mean", {0.5, 0.5, 0.5}}, {"image_std", {0.5, 0.5, 0.5}}});
  BuildSpec cnn = spec();
  cnn.vision_tower = (root_ / "cnn").string();
  const auto model = build_llava(cnn);
  save_hf_llava(*model, {}, options(40), out());
  const LoadedModel loaded = load_llava(out());
  set_log_sink(before);
  expect_equal(loaded.model->tensors(), model->tensors());
  EXPECT_EQ(loaded.model->image_spec().image_mean[0], 0.5f);
  EXPECT_EQ(loaded.model->image_spec().num_image_tokens, 4);
  EXPECT_EQ(loaded.model->mm_projector_type, "mlp2x_gelu");
}

TEST_F(ExportTest, ComponentsStandAlone) {
  const auto model = build_llava(spec());
  disturb(*model);
  save_hf_component(*model, "vision_tower", at::kFloat, out());
  EXPECT_EQ(read_json(out() / "config.json")["architectures"][0], "CLIPVisionModel");
  const auto tower = load_vision_tower(out(), {});
  const NamedTensors tensors = tower->tensors(), expected = model->vision->tensors();
  for (size_t i = 0; i < tensors.size(); ++i) EXPECT_TRUE(at::equal(tensors[i].value(), expected[i].value()));
  fs::create_directories(root_ / "text");
  save_hf_component(*model, "language_model", at::kHalf, root_ / "text");
  EXPECT_EQ(read_json(root_ / "text" / "config.json")["dtype"], "float16");
  EXPECT_TRUE(at::equal(load_language_model(root_ / "text")->head_weight(),
                        model->language->head_weight().to(at::kHalf).to(at::kFloat)));
  EXPECT_THROW(save_hf_component(*model, "projector", at::kFloat, out()), ConfigError);
}

TEST_F(ExportTest, FoldersAreResolved) {
  const auto model = build_llava(spec());
  const fs::path run = root_ / "run";
  EXPECT_THAT(error_of<CheckpointError>([&] { resolve_model_folder(run); }), HasSubstr("no such folder"));
  fs::create_directories(run / "pretrain");
  EXPECT_THAT(error_of<CheckpointError>([&] { resolve_model_folder(run); }),
              HasSubstr("no model: looked for config.json"));

  const fs::path steps = run / "pretrain" / "checkpoints";
  write_step(steps / "step-00000010", *model, "projector");
  write_step(steps / "step-00000020", *model, "projector");
  write_step(steps / "step-00000030", *model, "projector", /*finished=*/false);
  write_step(steps / "step-00000040.tmp-1", *model, "projector");
  EXPECT_EQ(resolve_model_folder(run), steps / "step-00000020");  // the newest that is finished
  EXPECT_EQ(resolve_model_folder(steps / "step-00000010"), steps / "step-00000010");
  EXPECT_THAT(error_of<CheckpointError>([&] { resolve_model_folder(steps / "step-00000030"); }),
              HasSubstr("no manifest.json"));
  write_file_atomic(run / "pretrain" / "latest", "step-00000010\n");
  EXPECT_EQ(resolve_model_folder(run / "pretrain"), steps / "step-00000010");
  for (const char* bad :
       {"step-00000030", "../../x", "step-../x", ""}) {  // "latest" that leads nowhere is passed over
    write_file_atomic(run / "pretrain" / "latest", bad);
    EXPECT_EQ(resolve_model_folder(run / "pretrain"), steps / "step-00000020") << bad;
  }
  fs::create_directories(run / "pretrain" / "final");
  save_hf_llava(*model, {}, options(40), run / "pretrain" / "final");
  EXPECT_EQ(resolve_model_folder(run), run / "pretrain" / "final");
  EXPECT_EQ(resolve_model_folder(run / "pretrain"), run / "pretrain" / "final");

  write_step(run / "finetune" / "checkpoints" / "step-00000005", *model, "projector");
  EXPECT_THAT(error_of<CheckpointError>([&] { resolve_model_folder(run); }),
              HasSubstr("several stages (finetune, pretrain, ...)"));
  write_json(run / "stages.json", {"pretrain", "finetune"});
  EXPECT_EQ(resolve_model_folder(run), run / "finetune" / "checkpoints" / "step-00000005");
  write_json(run / "stages.json", {"pretrain", "finetune", "later"});  // a stage not begun yet is passed over
  EXPECT_EQ(resolve_model_folder(run), run / "finetune" / "checkpoints" / "step-00000005");
  write_json(run / "stages.json", {"finetune", "pretrain"});
  EXPECT_EQ(resolve_model_folder(run), run / "pretrain" / "final");
  write_json(run / "stages.json", {"../x"});
  EXPECT_THAT(error_of<CheckpointError>([&] { resolve_model_folder(run); }),
              HasSubstr("expected the names of folders beside it"));
}

TEST_F(ExportTest, StepOfARunLoads) {
  const auto model = build_llava(spec());
  const auto base = build_llava(spec());
  disturb(*model);
  write_step(root_ / "step", *model, "projector");
  const LoadedModel loaded = load_llava(root_ / "step");
  expect_equal(loaded.model->component_tensors("projector"), model->component_tensors("projector"));
  expect_equal(loaded.model->component_tensors("language_model"), base->component_tensors("language_model"));
  EXPECT_EQ(loaded.card.conversation_template, "v1");
  EXPECT_EQ(loaded.card.image_aspect_ratio, "pad");
}

TEST_F(ExportTest, BuildSpecKeepsItself) {
  BuildSpec before = spec();
  before.features = {3, "cls_patch"};
  before.seed = ~uint64_t{0};
  before.overlays = {{"a/b", {"projector", "vision_tower"}}};
  EXPECT_EQ(to_json(build_spec_from_json(to_json(before), "x")), to_json(before));
  const auto refuse = [&](const char* key, const Json& value) {
    Json json = to_json(before);
    json[key] = value;
    return error_of<CheckpointError>([&] { build_spec_from_json(json, "x/caldera.json"); });
  };
  EXPECT_THAT(refuse("vision_tower", ""),
              HasSubstr("x/caldera.json: build: vision_tower and language_model"));
  EXPECT_THAT(refuse("seed", -1), HasSubstr("seed"));
  EXPECT_THAT(refuse("overlays", 1), HasSubstr("overlays: expected a list"));
  EXPECT_THAT(refuse("overlays", {{{"path", "x"}, {"components", {"everything"}}}}),
              HasSubstr("got \"everything\""));
  EXPECT_THAT(refuse("overlays", {{{"path", "x"}}}), HasSubstr("expected objects with"));
}

TEST_F(ExportTest, FoldersThatAreNoLlavaAreRefused) {
  const auto model = build_llava(spec());
  const auto load = [&] { load_llava(out()); };
  const auto with = [&](const Json& change) {
    save_hf_llava(*model, {}, options(40), out());
    Json config = read_json(out() / "config.json");
    config.update(change);
    write_json(out() / "config.json", config);
    return error_of<CheckpointError>(load);
  };
  EXPECT_EQ(with(Json::object()), "accepted");
  EXPECT_EQ(with({{"vision_feature_layer", {-2}}}), "accepted");
  EXPECT_THAT(with({{"model_type", "llava_next"}}),
              HasSubstr("expected llava or caldera_llava, got \"llava_next\""));
  EXPECT_THAT(with({{"projector_hidden_act", "relu"}}), HasSubstr("only gelu"));
  EXPECT_THAT(with({{"multimodal_projector_bias", false}}), HasSubstr("multimodal_projector_bias"));
  EXPECT_THAT(with({{"vision_feature_layer", {-2, -3}}}), HasSubstr("only a single layer"));
  EXPECT_THAT(with({{"vision_feature_select_strategy", "some"}}),
              HasSubstr("expected default or full, got some"));
  EXPECT_THAT(with({{"vision_config", nullptr}}), HasSubstr("vision_config: expected an object"));
  EXPECT_THAT(with({{"vision_config", {{"model_type", "dinov2"}}}}), HasSubstr("dinov2"));
  with(Json::object());
  TensorList tensors = list(model->tensors());
  tensors.emplace_back("image_newline", at::ones({48}));
  write_weights_folder(out(), tensors);
  EXPECT_THAT(error_of<CheckpointError>(load), HasSubstr("tensor image_newline has no place"));
  tensors.resize(tensors.size() - 2);
  write_weights_folder(out(), tensors);
  EXPECT_THAT(error_of<CheckpointError>(load), HasSubstr("1 of"));
}

// Not a test of its own: writes a folder and a batch with our logits for tests/parity/hf_folder.py to judge.
TEST_F(ExportTest, WritesForTheParityScript) {
  const char* dir = std::getenv("CALDERA_PARITY_DIR");
  if (dir == nullptr) GTEST_SKIP() << "CALDERA_PARITY_DIR is not set";
  const auto model = build_llava(spec());
  fs::create_directories(dir);
  save_hf_llava(*model, {"v1", "pad", 0, {}}, options(100), dir);
  const LoadedModel loaded = load_llava(dir);
  for (const char* part : {"vision_tower", "language_model"}) {
    fs::create_directories(fs::path(dir) / part);
    save_hf_component(*loaded.model, part, at::kFloat, fs::path(dir) / part);
  }

  const int64_t P = 16, num_images = 2, before = 3, after = 6;
  const int64_t length = before + P + after;
  at::manual_seed(1);
  PackedBatch batch;
  batch.pixels_ICYX = at::randint(0, 256, {num_images, 3, 28, 28}, at::kByte);
  batch.input_ids_T = at::randint(3, 99, {num_images * length}, at::kLong);
  batch.position_ids_T = at::arange(length, at::kLong).repeat({num_images});
  batch.cu_seqlens = {0, length, 2 * length};
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < num_images; ++i)
    rows.push_back(at::arange(i * length + before, i * length + before + P, at::kLong));
  batch.image_rows_IP = at::cat(rows);
  batch.input_ids_T.index_fill_(0, batch.image_rows_IP, kImageTokenIndex);
  const at::NoGradGuard no_grad;
  const at::Tensor logits = loaded.model->logits(batch);
  write_safetensors(fs::path(dir) / "batch.safetensors",
                    {{"input_ids", batch.input_ids_T.view({num_images, length})},
                     {"pixels", batch.pixels_ICYX},
                     {"logits", logits.view({num_images, length, -1})}});
}

}  // namespace
}  // namespace caldera
