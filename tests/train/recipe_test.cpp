#include "train/recipe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <random>

#include "base/error.h"
#include "base/files.h"
#include "base/strings.h"
#include "tests/support.h"
#include "train/recipe_fields.h"
#include "train/yaml_fields.h"

namespace caldera {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr const char* kBase =
    "model: {vision_tower: v, language_model: l}\n"
    "output: o\n"
    "stages:\n"
    "- name: pretrain\n"
    "  trainable: [projector]\n"
    "  data: {data_path: d, conversation_template: plain}\n";

const fs::path kSource = CALDERA_SOURCE_DIR;

// Each test runs in a folder of its own, so that messages can name "r.yaml".
class RecipeTest : public testing::Test {
 protected:
  RecipeTest() { fs::current_path(folder_.path()); }
  ~RecipeTest() override { fs::current_path(before_); }
  static Recipe read(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
    std::ofstream("r.yaml") << yaml;
    return read_recipe("r.yaml", overrides);
  }
  static std::string message(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
    try {
      read(yaml, overrides);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "(accepted)";
  }

 private:
  TemporaryFolder folder_;
  fs::path before_ = fs::current_path();
};

TEST_F(RecipeTest, ReadsWhatItSaysAndKeepsDefaults) {
  const Recipe recipe = read(std::string(kBase) +
                             "  optimizer:\n"
                             "    learning_rate: 2e-5   # a comment\n"
                             "    mm_projector_lr: 1.5e-4\n"
                             "  gradient_checkpointing: true\n"
                             "  max_steps: 12\n"
                             "seed: 18446744073709551615\n"
                             "device: \"cpu\"\n");
  EXPECT_EQ(recipe.model.vision_tower, "v");
  EXPECT_EQ(recipe.model.mm_projector_type, "mlp2x_gelu");
  ASSERT_EQ(recipe.stages.size(), 1u);
  EXPECT_EQ(recipe.stages[0].name, "pretrain");
  EXPECT_THAT(recipe.stages[0].trainable, ElementsAre("projector"));
  EXPECT_EQ(recipe.stages[0].optimizer.learning_rate, 2e-5);
  EXPECT_EQ(recipe.stages[0].optimizer.mm_projector_lr, 1.5e-4);
  EXPECT_EQ(recipe.stages[0].optimizer.vision_tower_lr, std::nullopt);
  EXPECT_EQ(recipe.stages[0].optimizer.warmup_ratio, 0.03);
  EXPECT_TRUE(recipe.stages[0].gradient_checkpointing);
  EXPECT_EQ(recipe.stages[0].max_steps, 12);
  EXPECT_EQ(recipe.stages[0].global_batch_size, 128);
  EXPECT_EQ(recipe.seed, UINT64_MAX);
  EXPECT_EQ(recipe.device, "cpu");
  EXPECT_FALSE(recipe.evaluation.has_value());
}

TEST_F(RecipeTest, TakesWhatOtherEditorsWrite) {
  EXPECT_EQ(read("\xef\xbb\xbf" + std::string(kBase)).output, "o");              // byte order mark
  EXPECT_EQ(read(replace_all(kBase, "\n", "\r\n")).stages[0].name, "pretrain");  // CRLF
  EXPECT_EQ(read("---\n" + std::string(kBase) + "...\n").output, "o");           // document markers
  EXPECT_EQ(read(std::string(kBase) + "# a\ttab in a comment\n\t\n").output,
            "o");  // tabs that indent nothing
  EXPECT_EQ(read(replace_all(kBase, "output: o", "output: 'it''s # a'")).output, "it's # a");
  EXPECT_EQ(read(replace_all(kBase, "output: o", "output: \"\\\"q\\\" \\u00e9\"")).output, "\"q\" \xc3\xa9");
  EXPECT_EQ(read(replace_all(kBase, "output: o", "output: 2026")).output,
            "2026");  // the key decides the type
}

TEST_F(RecipeTest, OverridesReplaceAndAdd) {
  const Recipe recipe =
      read(kBase, {"stages.pretrain.optimizer.learning_rate=1e-4", "stages.0.data.data_path=x=y",
                   "stages.0.trainable=[projector, language_model]", "seed=3", "seed=4",
                   "evaluation={data_path: q, conversation_template: plain}", "evaluation.max_questions=7"});
  EXPECT_EQ(recipe.stages[0].optimizer.learning_rate, 1e-4);
  EXPECT_EQ(recipe.stages[0].data.data_path, "x=y");
  EXPECT_EQ(recipe.stages[0].data.conversation_template, "plain");
  EXPECT_THAT(recipe.stages[0].trainable, ElementsAre("projector", "language_model"));
  EXPECT_EQ(recipe.seed, 4u);
  EXPECT_EQ(recipe.evaluation.value().data_path, "q");
  EXPECT_EQ(recipe.evaluation.value().max_questions, 7);
  // An override clears an optional block or setting.
  EXPECT_FALSE(read(std::string(kBase) + "evaluation: {data_path: q, conversation_template: plain}\n",
                    {"evaluation=null"})
                   .evaluation.has_value());
  EXPECT_EQ(read(kBase, {"stages.0.data.image_folder="}).stages[0].data.image_folder, "");
}

TEST_F(RecipeTest, ExpandsHomeAndTheEnvironmentInPaths) {
  ::setenv("CALDERA_TEST_DATA", "/data sets", 1);
  ::setenv("CALDERA_TEST_SET", "coco", 1);
  const std::string home = std::getenv("HOME") != nullptr ? std::getenv("HOME") : "";
  ::setenv("HOME", "/home/me", 1);
  const std::string yaml =
      "model: {vision_tower: ~/clip, language_model: \"~\", tokenizer: a~b}\n"
      "output: ${CALDERA_TEST_DATA}/out-$1\n"
      "stages:\n"
      "- name: pretrain\n"
      "  trainable: [projector]\n"
      "  data: {data_path: \"${CALDERA_TEST_DATA}/${CALDERA_TEST_SET}.json\", image_folder: ./~/x, "
      "conversation_template: plain}\n";
  const Recipe recipe = read(yaml, {"evaluation={data_path: ~/q, conversation_template: plain}"});
  EXPECT_EQ(recipe.model.vision_tower, "/home/me/clip");
  EXPECT_EQ(recipe.model.language_model, "/home/me");
  EXPECT_EQ(recipe.model.tokenizer, "a~b");
  EXPECT_EQ(recipe.output, "/data sets/out-$1");
  EXPECT_EQ(recipe.stages[0].data.data_path, "/data sets/coco.json");
  EXPECT_EQ(recipe.stages[0].data.image_folder, "./~/x");
  EXPECT_EQ(recipe.evaluation.value().data_path, "/home/me/q");
  // The resolved recipe depends on the environment no longer.
  ::unsetenv("CALDERA_TEST_DATA");
  EXPECT_EQ(dump_recipe(read(dump_recipe(recipe))), dump_recipe(recipe));
  EXPECT_EQ(
      message(yaml),
      "r.yaml:2:1: output: \"${CALDERA_TEST_DATA}/out-$1\": the environment has no CALDERA_TEST_DATA, or an "
      "empty "
      "one; export CALDERA_TEST_DATA=..., or write the path out\n"
      "r.yaml:6:10: stages.pretrain.data.data_path: \"${CALDERA_TEST_DATA}/${CALDERA_TEST_SET}.json\": the "
      "environment has no CALDERA_TEST_DATA, or an empty one; export CALDERA_TEST_DATA=..., or write the "
      "path out");
  ::setenv("CALDERA_TEST_DATA", "${CALDERA_TEST_SET}", 1);
  EXPECT_THAT(message(yaml),
              HasSubstr("becomes \"${CALDERA_TEST_SET}/out-$1\", which would be expanded again"));
  ::unsetenv("HOME");
  EXPECT_THAT(message(yaml),
              HasSubstr("r.yaml:1:9: model.vision_tower: \"~/clip\": ~ stands for $HOME, which is not set; "
                        "write the path out"));
  if (!home.empty()) ::setenv("HOME", home.c_str(), 1);
}

struct BadRecipe {
  std::string name, yaml, expected;
  std::vector<std::string> overrides;
};

std::vector<BadRecipe> bad_recipes() {
  std::vector<BadRecipe> cases;
  bool is_message = false;
  for (const std::string& line : split(read_file(kSource / "tests/train/bad_recipes.txt"), "\n")) {
    if (line.starts_with("=== ")) {
      cases.push_back({.name = line.substr(4)});
      is_message = false;
    } else if (cases.empty()) {
      continue;  // the file's head
    } else if (line == "--- refused:") {
      is_message = true;
    } else if (is_message) {
      if (!line.empty()) cases.back().expected += (cases.back().expected.empty() ? "" : "\n") + line;
    } else if (line.starts_with("override: ")) {
      cases.back().overrides.push_back(line.substr(10));
    } else {
      cases.back().yaml += line == "$BASE" ? kBase : line + "\n";
    }
  }
  return cases;
}

TEST_F(RecipeTest, EveryBadRecipeIsRefusedWithItsMessage) {
  const std::vector<BadRecipe> cases = bad_recipes();
  EXPECT_GE(cases.size(), 60u);
  for (const BadRecipe& c : cases) {
    const auto start = std::chrono::steady_clock::now();
    const std::string got = message(c.yaml, c.overrides);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1)) << c.name;
    EXPECT_EQ(got, c.expected) << c.name;
  }
}

TEST_F(RecipeTest, RefusesWhatIsNoRecipe) {
  EXPECT_THAT(message(std::string("model: \0", 8)),
              HasSubstr("r.yaml: not a text in UTF-8; is this the recipe?"));
  EXPECT_THAT(message("output: \xff\n"), HasSubstr("r.yaml: not a text in UTF-8; is this the recipe?"));
  EXPECT_EQ(message(std::string(300'000, '#')), "r.yaml: 300.0 kB long; a recipe is at most 256.0 kB");
  try {
    read_recipe("absent.yaml");
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(), "absent.yaml: no such recipe");
    EXPECT_EQ(error.exit_code(), 2);
  }
}

TEST_F(RecipeTest, ShowsFiftyFaultsOfMany) {
  std::string yaml = kBase;
  for (int i = 0; i < 80; ++i) yaml += fmt::format("key_{}: 1\n", i);
  const std::vector<std::string> lines = split(message(yaml), "\n");
  ASSERT_EQ(lines.size(), 51u);
  EXPECT_EQ(lines.back(), "... and 30 more faults");
}

// Whatever the bytes are, the outcome is a recipe or a ConfigError.
TEST_F(RecipeTest, BrokenBytesNeverDoMore) {
  const std::string whole =
      std::string(kBase) + "evaluation:\n  data_path: \"q\"\n  conversation_template: 'plain'\n";
  const std::string letters = ":[]{}&*!|>'\"%@`#-?, \n\t0~.a\\";
  std::minstd_rand random(1);
  int num_refused = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string yaml = whole;
    for (int edit = 0; edit < 3; ++edit) {
      const size_t at = random() % yaml.size();
      const char letter = letters[random() % letters.size()];
      switch (random() % 3) {
        case 0:
          yaml[at] = letter;
          break;
        case 1:
          yaml.insert(at, 1 + random() % 3, letter);
          break;
        default:
          yaml.erase(at, 1 + random() % 20);
      }
    }
    num_refused += message(yaml) != "(accepted)" ? 1 : 0;
  }
  EXPECT_GT(num_refused, 1000);
}

TEST_F(RecipeTest, DumpReadsBackAsTheSame) {
  Recipe recipe =
      read(kBase, {"stages.0.optimizer.mm_projector_lr=1e-5", "stages.0.optimizer.adam_epsilon=1e-300"});
  recipe.seed = UINT64_MAX;
  recipe.stages[0].optimizer.learning_rate = 0.1 + 0.2;
  recipe.stages[0].num_train_epochs = 3;
  recipe.stages.push_back(recipe.stages[0]);
  recipe.stages[1].name = "finetune";
  recipe.stages[1].trainable = {"language_model", "projector"};
  recipe.stages[1].optimizer.mm_projector_lr.reset();
  recipe.evaluation = EvaluationConfig{.data_path = "q", .conversation_template = "plain"};
  for (const char* text : {"null", "true", "- a", "a: b", "it's", "\"q\"", "#", "a #b", "tab\tnew\nline",
                           " lead", "\\n", "\xc3\xa9\xe2\x82\xac", "{", "%x", "*a", "010", "@", "-"}) {
    recipe.output = text;
    const std::string dump = dump_recipe(recipe);
    const Recipe again = read(dump);
    EXPECT_EQ(again.output, text) << dump;
    EXPECT_EQ(dump_recipe(again), dump);
    EXPECT_EQ(again.stages[0].optimizer.learning_rate, 0.1 + 0.2);
    EXPECT_EQ(again.stages[0].optimizer.adam_epsilon, 1e-300);
    EXPECT_EQ(again.stages[0].optimizer.mm_projector_lr, 1e-5);
    EXPECT_EQ(again.stages[1].optimizer.mm_projector_lr, std::nullopt);
    EXPECT_EQ(again.stages[1].trainable, recipe.stages[1].trainable);
    EXPECT_EQ(again.seed, UINT64_MAX);
    EXPECT_EQ(again.evaluation.value().data_path, "q");
  }
}

TEST(RecipeReference, PageIsWhatTheDeclarationsSay) {
  EXPECT_EQ(read_file(kSource / "docs/recipe.md"), recipe_reference())
      << "renew it: build/caldera recipe reference > docs/recipe.md";
}

TEST(RecipesInConfigs, AllAreRight) {
  int num_recipes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(kSource / "configs")) {
    if (entry.path().extension() != ".yaml") continue;
    SCOPED_TRACE(entry.path().string());
    EXPECT_NO_THROW(read_recipe(entry.path()));
    ++num_recipes;
  }
  EXPECT_GE(num_recipes, 4);
}

// The numbers of the published scripts.
TEST(RecipesInConfigs, Llava15IsAsPublished) {
  for (const char* name : {"7b", "13b"}) {
    const Recipe recipe = read_recipe(kSource / "configs/llava-v1.5" / (std::string(name) + ".yaml"));
    ASSERT_EQ(recipe.stages.size(), 2u);
    const StageConfig &pretrain = recipe.stages[0], &finetune = recipe.stages[1];
    EXPECT_EQ(recipe.model.mm_projector_type, "mlp2x_gelu");
    EXPECT_EQ(recipe.model.vision_feature_layer, -2);
    EXPECT_EQ(recipe.model.vision_feature_select_strategy, "patch");
    EXPECT_THAT(pretrain.trainable, ElementsAre("projector"));
    EXPECT_EQ(pretrain.optimizer.learning_rate, 1e-3);
    EXPECT_EQ(pretrain.global_batch_size, 256);
    EXPECT_EQ(pretrain.data.conversation_template, "plain");
    EXPECT_EQ(pretrain.data.image_aspect_ratio, "square");
    EXPECT_FALSE(pretrain.data.group_by_modality_length);
    EXPECT_THAT(finetune.trainable, ElementsAre("projector", "language_model"));
    EXPECT_EQ(finetune.optimizer.learning_rate, 2e-5);
    EXPECT_EQ(finetune.global_batch_size, 128);
    EXPECT_EQ(finetune.data.conversation_template, "v1");
    EXPECT_EQ(finetune.data.image_aspect_ratio, "pad");
    EXPECT_TRUE(finetune.data.group_by_modality_length);
    for (const StageConfig& stage : recipe.stages) {
      EXPECT_EQ(stage.num_train_epochs, 1);
      EXPECT_EQ(stage.data.model_max_length, 2048);
      EXPECT_EQ(stage.optimizer.weight_decay, 0);
      EXPECT_EQ(stage.optimizer.max_grad_norm, 0);
      EXPECT_EQ(stage.optimizer.warmup_ratio, 0.03);
      EXPECT_EQ(stage.optimizer.lr_scheduler_type, "cosine");
      EXPECT_EQ(stage.dtype, "bfloat16");
      EXPECT_TRUE(stage.gradient_checkpointing);
      EXPECT_EQ(stage.loss, "token_mean");
    }
  }
}

TEST(RecipesInConfigs, Llava15WithLoraIsAsPublished) {
  for (const std::string size : {"7b", "13b"}) {
    const Recipe full = read_recipe(kSource / "configs/llava-v1.5" / (size + ".yaml"));
    Recipe recipe = read_recipe(kSource / "configs/llava-v1.5" / (size + "_lora.yaml"));
    StageConfig& finetune = recipe.stages[1];
    EXPECT_TRUE(finetune.uses_lora());
    EXPECT_EQ(finetune.lora->lora_r, 128);
    EXPECT_EQ(finetune.lora->lora_alpha, 256);
    EXPECT_EQ(finetune.lora->lora_dropout, 0.05);
    EXPECT_FALSE(finetune.lora->use_rslora);
    EXPECT_TRUE(finetune.lora->target_modules.empty());
    EXPECT_EQ(finetune.optimizer.learning_rate, 2e-4);
    EXPECT_EQ(finetune.optimizer.mm_projector_lr, 2e-5);
    // All else is as without.
    finetune.lora.reset();
    finetune.optimizer.learning_rate = 2e-5;
    finetune.optimizer.mm_projector_lr.reset();
    recipe.output = full.output;
    EXPECT_EQ(dump_recipe(recipe), dump_recipe(full));
  }
}

TEST(RecipesInConfigs, LlavaV1IsAsPublished) {
  for (const char* name : {"7b", "13b"}) {
    const Recipe recipe = read_recipe(kSource / "configs/llava-v1" / (std::string(name) + ".yaml"));
    ASSERT_EQ(recipe.stages.size(), 2u);
    EXPECT_EQ(recipe.model.mm_projector_type, "linear");
    EXPECT_EQ(recipe.stages[0].optimizer.learning_rate, 2e-3);
    EXPECT_EQ(recipe.stages[1].optimizer.learning_rate, 2e-5);
    EXPECT_EQ(recipe.stages[1].num_train_epochs, 3);
    EXPECT_EQ(recipe.stages[1].data.image_aspect_ratio, "square");
    for (const StageConfig& stage : recipe.stages) EXPECT_EQ(stage.global_batch_size, 128);
  }
}

}  // namespace
}  // namespace caldera
