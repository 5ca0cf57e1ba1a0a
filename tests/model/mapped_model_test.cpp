// Models whose weights stay in their files give the same exports as loaded ones, after the same checks.
#include "model/weights/mapped_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/weights/gguf_export.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

class MappedModelTest : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"clip", "llama", "saved", "a", "b"}) fs::create_directories(root_ / name);
    write_json(root_ / "clip" / "config.json", {{"model_type", "clip_vision_model"},
                                                {"hidden_size", 32},
                                                {"intermediate_size", 64},
                                                {"num_hidden_layers", 3},
                                                {"num_attention_heads", 4},
                                                {"image_size", 28},
                                                {"patch_size", 7}});
    write_json(root_ / "llama" / "config.json", {{"model_type", "llama"},
                                                 {"hidden_size", 64},
                                                 {"intermediate_size", 96},
                                                 {"num_hidden_layers", 2},
                                                 {"num_attention_heads", 4},
                                                 {"num_key_value_heads", 2},
                                                 {"vocab_size", 100},
                                                 {"max_position_embeddings", 256}});
    BuildSpec spec;
    spec.vision_tower = (root_ / "clip").string();
    spec.language_model = (root_ / "llama").string();
    spec.seed = 4;
    // The placeholder lies beyond the vocabulary: the file's is padded.
    save_hf_llava(*build_llava(spec), {"v1", "pad", 0, {}}, {.dtype = at::kBFloat16, .image_token_id = 100},
                  saved());
  }

  std::string refusal_after(const std::function<void(TensorList&)>& edit) const {
    TensorList tensors;
    {
      const auto source = open_weights_folder(saved());
      for (const std::string& name : source->names()) tensors.emplace_back(name, source->read(name).clone());
    }
    const TensorList before = tensors;
    edit(tensors);
    write_weights_folder(saved(), tensors);
    const std::string message = error_of<CheckpointError>([&] { map_llava(saved()); });
    write_weights_folder(saved(), before);
    return message;
  }
  fs::path saved() const { return root_ / "saved"; }
  TemporaryFolder temporary_;
  const fs::path root_ = temporary_.path();
};

TEST_F(MappedModelTest, GivesTheValuesThatLoadingGives) {
  const LoadedModel loaded = load_llava(saved());
  const auto mapped = map_llava(saved());
  ASSERT_TRUE(mapped.has_value());
  EXPECT_EQ(mapped->loaded.card.conversation_template, "v1");
  EXPECT_EQ(mapped->loaded.model->language->vocab_size(), 100);
  for (const char* part : {"vision_tower", "projector", "language_model"}) {
    const NamedTensors a = loaded.model->component_tensors(part),
                       b = mapped->loaded.model->component_tensors(part);
    for (size_t i = 0; i < a.size(); ++i) {
      const at::Tensor value = mapped->values(b[i]);
      EXPECT_EQ(value.scalar_type(), at::kBFloat16);
      EXPECT_TRUE(at::equal(a[i].value(), value.to(at::kFloat))) << a[i].name;
    }
  }
  // A component's own list has other names for the same tensors.
  const NamedTensor tower = mapped->loaded.model->vision->tensors()[0];
  EXPECT_TRUE(at::equal(mapped->values(tower).to(at::kFloat), loaded.model->vision->tensors()[0].value()));
}

TEST_F(MappedModelTest, ExportsAreTheSameBytes) {
  const LoadedModel loaded = load_llava(saved());
  const auto mapped = map_llava(saved());
  ASSERT_TRUE(mapped.has_value());
  ExportOptions options = {.dtype = at::kHalf, .image_token_id = 40};
  save_hf_llava(*loaded.model, loaded.card, options, root_ / "a");
  options.values = mapped->values;
  save_hf_llava(*mapped->loaded.model, mapped->loaded.card, options, root_ / "b");
  for (const char* file : {"model.safetensors", "config.json", "README.md"})
    EXPECT_EQ(read_file(root_ / "a" / file), read_file(root_ / "b" / file)) << file;
  GgufExportOptions gguf = {.type = GgmlType::kQ8_0, .image_aspect_ratio = "pad"};
  save_gguf_decoder(*loaded.model->language, gguf, root_ / "a.gguf");
  gguf.values = mapped->values;
  save_gguf_decoder(*mapped->loaded.model->language, gguf, root_ / "b.gguf");
  EXPECT_EQ(read_file(root_ / "a.gguf"), read_file(root_ / "b.gguf"));
}

TEST_F(MappedModelTest, ChecksWhatLoadingChecks) {
  const std::string norm = "language_model.model.norm.weight";
  const auto replace = [&](at::Tensor value) {
    return [&, value](TensorList& tensors) {
      for (auto& [name, tensor] : tensors)
        if (name == norm) tensor = value;
    };
  };
  EXPECT_EQ(refusal_after([](TensorList&) {}), "accepted");
  EXPECT_THAT(refusal_after([&](TensorList& tensors) {
                std::erase_if(tensors, [&](const auto& item) { return item.first == norm; });
              }),
              HasSubstr("tensor language_model.model.norm.weight is missing"));
  EXPECT_THAT(refusal_after(replace(at::ones({63}))), HasSubstr(norm + ": expected shape [64], got [63]"));
  EXPECT_THAT(refusal_after(replace(at::ones({64}, at::kLong))),
              HasSubstr("expected floating-point weights, got Long"));
  EXPECT_THAT(refusal_after([](TensorList& tensors) { tensors.emplace_back("extra", at::ones({2})); }),
              HasSubstr("tensor extra has no place in the model"));
}

TEST_F(MappedModelTest, OtherFoldersMustBeLoaded) {
  EXPECT_FALSE(map_llava(root_ / "llama").has_value());
  write_json(root_ / "a" / "caldera.json", Json::object());
  write_json(root_ / "a" / "manifest.json", Json::object());
  EXPECT_FALSE(map_llava(root_ / "a").has_value());  // a step's checkpoint
}

}  // namespace
}  // namespace caldera
