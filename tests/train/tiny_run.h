// A stage that trains the tiny model on the tiny data, and what it reports.
#pragma once
#include <gtest/gtest.h>

#include <csignal>
#include <functional>
#include <vector>

#include "base/files.h"
#include "tests/eval/tiny_model.h"
#include "train/run.h"

namespace caldera {

struct Recorder : TrainingObserver {
  void on_step(const StepMetrics& metrics) override {
    losses.push_back(metrics.loss);
    is_stopped = is_stopped || (stop && stop());
  }
  void on_stage(const StageStart& start) override { num_trainable = start.num_trainable; }
  std::function<bool()> stop;  // asked after each step: whether a signal has come
  bool is_stopped = false;
  std::vector<double> losses;
  int64_t num_trainable = 0;
};

// Parts and data for tiny_recipe.
inline void write_tiny_run(const fs::path& folder) {
  write_tiny_parts(folder / "parts");
  write_tiny_data(folder);
}

// Projector and decoder on four questions; `output` is below `folder`.
inline Recipe tiny_recipe(const fs::path& folder, const std::string& output) {
  Recipe recipe;
  recipe.model.vision_tower = (folder / "parts" / "vision").string();
  recipe.model.language_model = (folder / "parts" / "language").string();
  recipe.model.random_parts = {"vision_tower", "language_model"};
  recipe.output = (folder / output).string();
  recipe.device = "cpu";
  StageConfig stage;
  stage.name = "finetune";
  stage.trainable = {"projector", "language_model"};
  stage.data.data_path = (folder / "test.json").string();
  stage.data.image_folder = (folder / "images").string();
  stage.data.conversation_template = "v1";
  stage.data.model_max_length = 400;
  stage.global_batch_size = 4;
  recipe.stages = {stage};
  return recipe;
}

// The same for six steps, large enough that each of them shows.
inline Recipe six_step_recipe(const fs::path& folder, const std::string& output) {
  Recipe recipe = tiny_recipe(folder, output);
  recipe.stages[0].optimizer.learning_rate = 1e-2;
  recipe.stages[0].max_steps = 6;
  return recipe;
}

// The bytes of what the last stage left.
inline std::string final_weights(const Recipe& recipe) {
  return read_file(fs::path(recipe.output) / recipe.stages.back().name / "final" / "model.safetensors");
}

// Tests that train such recipes in a folder of their own.
class TinyRunTest : public testing::Test {
 protected:
  void SetUp() override { write_tiny_run(folder_.path()); }

  // The losses of the steps from where the run stands, until `stop` or the end.
  std::vector<double> train(
      const Recipe& recipe, const std::function<bool()>& stop = [] { return false; }) {
    Recorder recorder;
    recorder.stop = stop;
    run_recipe(recipe, {.resume = "auto"}, recorder, [&] { return recorder.is_stopped ? SIGTERM : 0; });
    num_trainable_ = recorder.num_trainable;
    return recorder.losses;
  }
  static fs::path final_of(const Recipe& recipe) {
    return fs::path(recipe.output) / recipe.stages.back().name / "final";
  }

  TemporaryFolder folder_;
  int64_t num_trainable_ = 0;  // of the stage that trained last
};

}  // namespace caldera
