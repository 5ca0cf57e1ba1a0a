// Adapters of a whole model, written as PEFT's folders and read back.
#include "model/weights/adapters.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/weights/torch_pickle_write.h"
#include "tests/eval/tiny_model.h"

namespace caldera {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::IsSupersetOf;
using testing::ThrowsMessage;

// An adapter on a whole model, its B not zero.
class AdapterTest : public testing::Test {
 protected:
  void SetUp() override {
    write_tiny_parts(folder_.path() / "parts");
    spec_.vision_tower = (folder_.path() / "parts" / "vision").string();
    spec_.language_model = (folder_.path() / "parts" / "language").string();
    write_tiny_model(base());
    fs::create_directories(out());
  }
  fs::path base() const { return folder_.path() / "base"; }
  fs::path out() const { return folder_.path() / "adapter"; }

  // The base with a fresh adapter, filled.
  std::unique_ptr<LlavaModel> adapted(const LoraConfig& config) {
    auto model = load_llava(base()).model;
    for (Linear* linear : model->language->linears()) linear->attach(config, 9);
    for (const NamedTensor& tensor : model->tensors()) {
      at::Tensor value = tensor.value();
      if (is_lora_name(tensor.name)) init_normal_(value, 0.3, 2, tensor.name);
      if (tensor.name.starts_with("multi_modal_projector")) value += 0.25;
    }
    spec_.lora = config;
    return model;
  }
  static void merge(LlavaModel& model) {
    for (Linear* linear : model.language->linears()) linear->merge();
  }
  static void expect_close(LlavaModel& got, LlavaModel& expected) {
    NamedTensors a = got.tensors(), b = expected.tensors();
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i)
      EXPECT_TRUE(at::allclose(a[i].value(), b[i].value(), 1e-5, 1e-6)) << a[i].name;
  }
  void change_config(const char* key, const Json& value) {
    Json config = read_json(out() / "adapter_config.json");
    config[key] = value;
    write_json(out() / "adapter_config.json", config);
  }

  TemporaryFolder folder_;
  BuildSpec spec_;
};

TEST_F(AdapterTest, TouchesTheDecoderAlone) {
  const auto model = adapted({.lora_r = 2});
  int adapters = 0;
  for (const NamedTensor& tensor : model->tensors()) {
    if (!is_lora_name(tensor.name)) continue;
    EXPECT_TRUE(tensor.name.starts_with("language_model.model.layers.")) << tensor.name;
    ++adapters;
  }
  EXPECT_EQ(adapters, 2 * 7 * 2);
}

TEST_F(AdapterTest, GoesOutAsPeftAndComesBackMerged) {
  const auto model = adapted({.lora_r = 3, .lora_alpha = 5, .use_rslora = true});
  Adapter adapter = adapter_of(*model, spec_, {"projector", "language_model"});
  adapter.base_model = base().string();
  write_peft_adapter(adapter, /*for_decoder=*/false, at::kFloat, out());
  const auto file = open_safetensors(out() / "adapter_model.safetensors");
  EXPECT_TRUE(file->has("base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight"));
  EXPECT_TRUE(file->has("base_model.model.model.multi_modal_projector.linear_1.weight"));
  const Json config = read_json(out() / "adapter_config.json");
  EXPECT_EQ(config["modules_to_save"], (Json{"multi_modal_projector"}));
  EXPECT_EQ(config["target_modules"],
            ".*language_model\\..*\\.(down_proj|gate_proj|k_proj|o_proj|q_proj|up_proj|v_proj)");
  EXPECT_EQ(config["lora_alpha"], 5);

  const LoadedModel loaded = load_llava(out());
  EXPECT_EQ(loaded.folder, base());  // the tokenizer's
  EXPECT_EQ(loaded.card.conversation_template, "v1");
  merge(*model);
  expect_close(*loaded.model, *model);
}

TEST_F(AdapterTest, ForTheDecoderAloneItsNamesBeginThere) {
  const auto model = adapted({.lora_r = 3, .target_modules = {"q_proj", "down_proj"}});
  const Adapter adapter = adapter_of(*model, spec_, {"projector", "language_model"});
  write_peft_adapter(adapter, /*for_decoder=*/true, at::kFloat, out());
  EXPECT_EQ(read_json(out() / "adapter_config.json")["target_modules"], (Json{"down_proj", "q_proj"}));
  const auto file = open_safetensors(out() / "adapter_model.safetensors");
  EXPECT_TRUE(file->has("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"));
  EXPECT_EQ(file->names().size(), 2u * 2 * 2);

  // Onto a base of the user's choice; the projector is the base's.
  const LoadedModel loaded = load_llava(out(), base());
  merge(*model);
  const auto before = load_llava(base());
  for (size_t i = 0; i < model->tensors().size(); ++i) {
    const NamedTensor got = loaded.model->tensors()[i];
    const bool is_projector = got.name.starts_with("multi_modal_projector");
    EXPECT_TRUE(
        at::allclose(got.value(), (is_projector ? *before.model : *model).tensors()[i].value(), 1e-5, 1e-6))
        << got.name;
  }
}

TEST_F(AdapterTest, WhatDoesNotFitIsRefused) {
  const auto model = adapted({.lora_r = 3});
  const Adapter adapter = adapter_of(*model, spec_, {"language_model"});
  write_peft_adapter(adapter, false, at::kFloat, out());
  const auto message = [&](const fs::path& model_base) -> std::string {
    try {
      load_llava(out(), model_base);
    } catch (const CheckpointError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message(base()), "accepted");
  EXPECT_THAT(message({}), HasSubstr("name it with --model-base"));
  EXPECT_THAT(message(out() / "no"), HasSubstr("no folder here"));
  change_config("r", 4);
  EXPECT_THAT(message(base()), HasSubstr("do not fit rank 4"));
  change_config("r", 3);
  change_config("use_dora", true);
  EXPECT_THAT(message(base()), HasSubstr("use_dora: true is not supported; merge the adapter with PEFT"));
  change_config("use_dora", false);
  change_config("bias", "all");
  EXPECT_THAT(message(base()), HasSubstr("bias: \"all\" is not supported"));
  change_config("bias", "none");
  change_config("rank_pattern", {{"q_proj", 8}});
  EXPECT_THAT(message(base()), HasSubstr("rank_pattern"));
  change_config("rank_pattern", Json::object());
  change_config("init_lora_weights", "pissa_niter_4");
  EXPECT_THAT(message(base()), HasSubstr("init_lora_weights: \"pissa_niter_4\" is not supported"));
  change_config("init_lora_weights", "gaussian");
  EXPECT_EQ(message(base()), "accepted");
  change_config("peft_type", "LOHA");
  EXPECT_THAT(message(base()), HasSubstr("peft_type: expected LORA, got \"LOHA\""));
  change_config("peft_type", "LORA");
  EXPECT_EQ(message(base()), "accepted");

  const std::string q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight";
  const auto rewrite = [&](const std::function<void(TensorList&)>& change) {
    TensorList tensors;
    {
      const auto file = open_safetensors(out() / "adapter_model.safetensors");
      for (const std::string& name : file->names()) tensors.emplace_back(name, file->read(name).clone());
    }
    change(tensors);
    write_safetensors(out() / "adapter_model.safetensors", tensors);
  };
  rewrite([&](TensorList& tensors) {
    std::erase_if(tensors, [&](const auto& item) { return item.first == q; });
  });
  EXPECT_THAT(message(base()), HasSubstr("q_proj.lora_B.weight without lora_A"));
  rewrite([&](TensorList& tensors) {
    tensors.emplace_back(q, at::zeros({3, 32}));
    tensors.emplace_back("base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight",
                         at::zeros({3, 32}));
  });
  EXPECT_THAT(message(base()),
              HasSubstr("layers.9.self_attn.q_proj.lora_A.weight has no place in the model"));
  EXPECT_THAT([&] { read_adapter(base()); },
              ThrowsMessage<CheckpointError>(HasSubstr("no adapter: looked for")));
}

// What LLaVA's train.py leaves of finetune_lora.sh: names from its own class, the projector beside, the tower
// by name.
TEST_F(AdapterTest, TheOriginalLlavasFoldersAreRead) {
  const auto model = adapted({.lora_r = 2});
  const Adapter adapter = adapter_of(*model, spec_, {"projector", "language_model"});
  TensorList lora, others;
  for (const auto& [name, tensor] : adapter.tensors) {
    const std::string decoder = "language_model.", projector = "multi_modal_projector.linear_";
    if (name.starts_with(decoder))
      lora.emplace_back("base_model.model." + name.substr(decoder.size()), tensor);
    else  // linear_1.weight -> 0.weight, linear_2 -> 2
      others.emplace_back(
          fmt::format("base_model.model.model.mm_projector.{}{}", name[projector.size()] == '1' ? 0 : 2,
                      name.substr(projector.size() + 1)),
          tensor);
  }
  write_torch_pickle(out() / "adapter_model.bin", lora);
  write_torch_pickle(out() / "non_lora_trainables.bin", others);
  const fs::path decoder = folder_.path() / "vicuna", tower = folder_.path() / "tower";
  const auto whole = load_llava(base()).model;
  for (const fs::path& folder : {decoder, tower}) fs::create_directories(folder);
  save_hf_component(*whole, "language_model", at::kFloat, decoder);
  save_hf_component(*whole, "vision_tower", at::kFloat, tower);
  write_json(out() / "adapter_config.json", {{"peft_type", "LORA"},
                                             {"r", 2},
                                             {"lora_alpha", 16},
                                             {"lora_dropout", 0.05},
                                             {"bias", "none"},
                                             {"fan_in_fan_out", false},
                                             {"modules_to_save", Json()},
                                             {"target_modules", {"q_proj", "up_proj"}},
                                             {"base_model_name_or_path", decoder.string()}});
  Json config = whole->language->config();
  config["architectures"] = {"LlavaLlamaForCausalLM"};
  config["model_type"] = "llava_llama";
  config["mm_vision_tower"] = tower.string();
  config["mm_projector_type"] = "mlp2x_gelu";
  config["mm_vision_select_layer"] = -2;
  config["mm_vision_select_feature"] = "patch";
  config["image_aspect_ratio"] = "pad";
  write_json(out() / "config.json", config);

  const LoadedModel loaded = load_llava(out());
  EXPECT_EQ(loaded.card.image_aspect_ratio, "pad");
  EXPECT_EQ(loaded.folder, decoder);
  merge(*model);
  expect_close(*loaded.model, *model);

  fs::remove(out() / "non_lora_trainables.bin");
  EXPECT_THAT([&] { load_llava(out()); },
              ThrowsMessage<CheckpointError>(HasSubstr("no projector: looked for")));
  config["mm_vision_tower"] = "openai/not-here";
  write_json(out() / "config.json", config);
  EXPECT_THAT([&] { load_llava(out()); },
              ThrowsMessage<CheckpointError>(HasSubstr("\"openai/not-here\" is no folder here")));
  fs::remove(out() / "config.json");
  EXPECT_THAT([&] { load_llava(out()); }, ThrowsMessage<CheckpointError>(HasSubstr("is a decoder alone")));
}

TEST_F(AdapterTest, LayersOfTheOriginalsProjectorAreEveryOtherChild) {
  const auto names_of = [&](const TensorList& others) {
    const TensorList lora = {{"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", at::zeros({2, 4})}};
    write_torch_pickle(out() / "adapter_model.bin", lora);
    write_torch_pickle(out() / "non_lora_trainables.bin", others);
    write_json(out() / "adapter_config.json", {{"peft_type", "LORA"}, {"r", 2}});
    std::vector<std::string> names;
    for (const auto& [name, tensor] : read_adapter(out()).tensors) names.push_back(name);
    return names;
  };
  const std::string root = "base_model.model.model.mm_projector.";
  EXPECT_THAT(names_of({{root + "0.bias", at::zeros({4})}, {root + "4.weight", at::zeros({4, 4})}}),
              IsSupersetOf({"multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_3.weight"}));
  EXPECT_THAT(names_of({{root + "weight", at::zeros({4, 4})}}), Contains("multi_modal_projector.linear_1.weight"));
}

}  // namespace
}  // namespace caldera
