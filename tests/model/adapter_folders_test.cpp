// Adapters' folders as others leave them: names of wrappers, files without matrices, settings of another
// mathematics.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/weights/adapters.h"
#include "model/weights/load.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

class AdapterFoldersTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* part : {"tower", "decoder"}) fs::create_directories(folder_ / part);
    write_json(folder_ / "tower/config.json", {{"model_type", "siglip_vision_model"},
                                               {"hidden_size", 24},
                                               {"intermediate_size", 40},
                                               {"num_hidden_layers", 2},
                                               {"num_attention_heads", 3},
                                               {"image_size", 28},
                                               {"patch_size", 7}});
    write_json(folder_ / "decoder/config.json", {{"model_type", "llama"},
                                                 {"hidden_size", 32},
                                                 {"intermediate_size", 48},
                                                 {"num_hidden_layers", 2},
                                                 {"num_attention_heads", 4},
                                                 {"vocab_size", 50}});
    spec_.vision_tower = (folder_ / "tower").string();
    spec_.language_model = (folder_ / "decoder").string();
    model_ = build_llava(spec_);
  }
  fs::path write_adapter(const Json& change, const TensorList& tensors) {
    const fs::path folder = folder_ / "adapter";
    fs::create_directories(folder);
    Json config = {{"peft_type", "LORA"},
                   {"r", 2},
                   {"lora_alpha", 4},
                   {"target_modules", {"q_proj"}},
                   {"base_model_name_or_path", "base"},
                   {"rank_pattern", Json::object()},
                   {"use_dora", false},
                   {"alora_invocation_tokens", nullptr},
                   {"qalora_group_size", 16},
                   {"megatron_core", "megatron.core"}};
    config.update(change);
    write_json(folder / "adapter_config.json", config);
    write_safetensors(folder / "adapter_model.safetensors", tensors);
    return folder;
  }
  std::string refusal(const Json& change, const TensorList& tensors) {
    return error_of<CheckpointError>([&] { read_adapter(write_adapter(change, tensors)); });
  }
  static TensorList pair(const std::string& prefix, const std::string& infix = "") {
    const std::string module = prefix + "layers.0.self_attn.q_proj.";
    return {{module + "lora_A." + infix + "weight", at::ones({2, 32})},
            {module + "lora_B." + infix + "weight", at::ones({32, 2})}};
  }
  TemporaryFolder temporary_;
  const fs::path folder_ = temporary_.path();
  BuildSpec spec_;
  std::unique_ptr<LlavaModel> model_;
};

TEST_F(AdapterFoldersTest, NamesOfWrappersAreStripped) {
  const std::string expected = "language_model.model.layers.0.self_attn.q_proj.lora_A.weight";
  const std::vector<TensorList> files = {
      pair("base_model.model.model."), pair("base_model.model.model.", "default."),
      pair("_orig_mod.base_model.model.model."),
      pair("_fsdp_wrapped_module.base_model.model.model._fsdp_wrapped_module."),
      pair("base_model.model._orig_mod.model.", "default.")};
  for (const TensorList& file : files) {
    ASSERT_EQ(refusal(Json::object(), file), "accepted") << file[0].first;
    const Adapter adapter = read_adapter(folder_ / "adapter");
    EXPECT_EQ(adapter.tensors[0].first, expected) << file[0].first;
    const auto base = build_llava(spec_);
    merge_adapter(*base, adapter);
    const std::string weight = "language_model.model.layers.0.self_attn.q_proj.weight";
    for (size_t i = 0; i < base->tensors().size(); ++i) {  // ones of rank 2, scaled by 2
      const float expected_step = base->tensors()[i].name == weight ? 4 : 0;
      EXPECT_TRUE(at::allclose(base->tensors()[i].value(), model_->tensors()[i].value() + expected_step));
    }
  }
  TensorList twice = pair("base_model.model.model.");
  twice.push_back(pair("_orig_mod.base_model.model.model.")[0]);
  EXPECT_THAT(refusal(Json::object(), twice), HasSubstr("a second tensor for " + expected));
}

TEST_F(AdapterFoldersTest, AFileWithoutMatricesIsNoAdapter) {
  const std::string file = (folder_ / "adapter/adapter_model.safetensors").string();
  EXPECT_THAT(refusal(Json::object(), {}),
              HasSubstr(file + ": holds no tensors of an adapter (0 tensors in all)"));
  EXPECT_THAT(refusal(Json::object(), {{"base_model.model.lm_head.weight", at::ones({50, 32})}}),
              HasSubstr("holds no tensors of an adapter (1 tensors in all)"));
  // Messages of merging name the file.
  ASSERT_EQ(refusal(Json::object(), pair("base_model.model.model.other.")), "accepted");
  EXPECT_THAT(error_of<CheckpointError>([&] { merge_adapter(*model_, read_adapter(folder_ / "adapter")); }),
              HasSubstr(file + ": adapter: tensor language_model.model.other."));
}

TEST_F(AdapterFoldersTest, SettingsThatChangeTheMathematicsAreRefusedByKey) {
  const std::vector<std::pair<std::string, Json>> settings = {{"alora_invocation_tokens", {1, 2}},
                                                              {"rank_pattern", {{"q_proj", 4}}},
                                                              {"alpha_pattern", {{"q_proj", 4}}},
                                                              {"use_dora", true},
                                                              {"lora_bias", true},
                                                              {"trainable_token_indices", {1}},
                                                              {"target_parameters", {"x"}},
                                                              {"layer_replication", {{0, 1}}},
                                                              {"use_qalora", true},
                                                              {"a_setting_of_tomorrow", "on"},
                                                              {"fan_in_fan_out", true},
                                                              {"bias", "all"}};
  for (const auto& [key, value] : settings)
    EXPECT_THAT(refusal({{key, value}}, pair("base_model.model.model.")),
                HasSubstr("adapter_config.json: " + key + ": " + value.dump() + " is not supported"))
        << key;
  EXPECT_EQ(
      refusal({{"a_setting_of_tomorrow", false}, {"another", nullptr}}, pair("base_model.model.model.")),
      "accepted");
}

}  // namespace
}  // namespace caldera
