#include "train/stage.h"
#include "tests/aten.h"

#include <gmock/gmock.h>

#include <set>

#include "tests/train/tiny_run.h"

namespace caldera {
namespace {

class StageTensorsTest : public TinyRunTest {
 protected:
  // Trains the tower too, at rates that show, with decay.
  Recipe recipe(const std::string& output, int64_t vision_feature_layer) const {
    Recipe recipe = six_step_recipe(folder_.path(), output);
    recipe.model.vision_feature_layer = vision_feature_layer;
    recipe.stages[0].trainable = {"projector", "vision_tower"};
    recipe.stages[0].optimizer.lr_scheduler_type = "constant";
    recipe.stages[0].optimizer.warmup_ratio = 0;
    recipe.stages[0].optimizer.weight_decay = 0.1;
    recipe.stages[0].max_steps = 10;
    return recipe;
  }

  void use_siglip() const {
    const fs::path file = folder_.path() / "parts" / "vision" / "config.json";
    Json config = read_json(file);
    config["model_type"] = "siglip_vision_model";
    write_json(file, config);
  }

  // Names of the tower's tensors that are equal in both, without "vision_tower.vision_model.".
  static std::set<std::string> unchanged(LlavaModel& before, LlavaModel& after) {
    const NamedTensors old = before.component_tensors("vision_tower"),
                       now = after.component_tensors("vision_tower");
    std::set<std::string> names;
    for (size_t i = 0; i < old.size(); ++i)
      if (at::equal(old[i].value(), now[i].value()))
        names.insert(old[i].name.substr(std::string("vision_tower.vision_model.").size()));
    return names;
  }
};

}  // namespace

// torch.optim.AdamW leaves parameters alone whose .grad is None; decayed, ten steps at learning rate 1e-2 and
// weight decay 0.1 leave (1 - 1e-3)^10 = 0.990045 of their norm.
TEST_F(StageTensorsTest, WhatNoFeatureDependsOnIsNotDecayed) {
  for (const bool is_siglip : {false, true}) {
    if (is_siglip) use_siglip();
    const Recipe run = recipe(is_siglip ? "siglip" : "clip", -2);
    const auto start = build_llava(build_spec_of(run, 0));
    train(run);
    const auto end = load_llava(final_of(run)).model;
    std::set<std::string> expected;
    for (const NamedTensor& tensor : start->component_tensors("vision_tower")) {
      const std::string name = tensor.name.substr(std::string("vision_tower.vision_model.").size());
      if (name.starts_with("encoder.layers.1.") || name.starts_with("post_layernorm.") ||
          name.starts_with("head."))
        expected.insert(name);
    }
    EXPECT_EQ(unchanged(*start, *end), expected);
    EXPECT_EQ(expected.size(), is_siglip ? 16 + 2 + 11u : 16 + 2u);
  }
}

TEST_F(StageTensorsTest, WhatHasNoGradientTakesNoState) {
  for (const auto& [layer, blocks] : {std::pair{-1, 2}, {-2, 1}, {0, 0}}) {
    const Recipe run = recipe("out", layer);
    const auto model = build_llava(build_spec_of(run, 0));
    const std::vector<ParameterGroup> groups = parameter_groups(*model, run.stages[0]);
    ASSERT_EQ(groups.size(), 2u);
    EXPECT_EQ(groups[1].name, "vision_tower");
    constexpr int64_t kEmbeddings = 16 + 16 * 3 * 16 * 16 + 5 * 16 + 2 * 16;
    constexpr int64_t kBlock = 4 * (16 * 16 + 16) + 2 * 2 * 16 + (16 * 32 + 32) + (32 * 16 + 16);
    EXPECT_EQ(count_parameters(groups[1].tensors), kEmbeddings + blocks * kBlock);
    // Each that is left has a gradient indeed.
    set_trainable(model->tensors(), false);
    set_trainable(groups[1].tensors, true);
    model->image_features(at::randint(0, 255, {1, 3, 32, 32}, at::kByte)).sum().backward();
    for (const NamedTensor& tensor : groups[1].tensors) EXPECT_TRUE(tensor.grad().defined()) << tensor.name;
  }
}

TEST(StageWarning, PartsThatSeeNoPictureCannotLearn) {
  StageConfig stage;
  stage.name = "finetune";
  stage.trainable = {"projector", "language_model", "vision_tower"};
  stage.data.data_path = "d.json";
  std::vector<Record> records(3);
  EXPECT_EQ(trainable_warning(stage, records),
            "stages.finetune.trainable: projector and vision_tower cannot learn from d.json, none of whose 3 "
            "records has a "
            "picture; leave it out, or name data with pictures");
  records[1].images = {"x.png"};
  EXPECT_EQ(trainable_warning(stage, records), "");
  records[1].images.clear();
  stage.trainable = {"language_model"};
  EXPECT_EQ(trainable_warning(stage, records), "");
}

}  // namespace caldera
