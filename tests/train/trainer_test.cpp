// Properties of the whole loop, on a tiny model and pictures.
#include "train/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "base/fault.h"
#include "model/weights/safetensors.h"
#include "tests/train/tiny_run.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

class TrainerTest : public testing::Test {
 protected:
  void SetUp() override { write_tiny_run(folder_.path()); }

  Recipe recipe(const std::string& output) const { return six_step_recipe(folder_.path(), output); }

  // `stop`, asked after each step, is a signal's arrival.
  std::vector<double> train(
      const Recipe& recipe, const std::string& resume = "auto",
      const std::function<bool()>& stop = [] { return false; }, World& world = World::alone()) {
    struct Stopper : Recorder {
      void on_step(const StepMetrics& metrics) override {
        Recorder::on_step(metrics);
        if (stop()) signal = kSignal;
      }
      void on_stop(int number) override { heard.push_back(number); }
      std::function<bool()> stop;
      int signal = 0;
      std::vector<int> heard;
    } recorder;
    recorder.stop = stop;
    outcome_ =
        run_recipe(recipe, {.resume = resume, .world = &world}, recorder, [&] { return recorder.signal; });
    EXPECT_EQ(recorder.heard, std::vector<int>(outcome_ == Outcome::kStopped ? 1 : 0, kSignal));
    return recorder.losses;
  }
  static WorldSpec spec_of(int attempt, const std::string& run_id) {
    WorldSpec spec;
    spec.attempt = attempt;
    spec.run_id = run_id;
    return spec;
  }
  // One of a run's attempts, as launchers start them.
  std::vector<double> train_attempt(int number, const std::string& run_id, const Recipe& recipe,
                                    const std::string& resume, int stop_after = 0) {
    World world(spec_of(number, run_id), at::kCPU, 20, {});
    set_fault_rank(0, 0);  // faults of other tests are of the first attempt
    int steps = 0;
    return train(
        recipe, resume, [&] { return ++steps == stop_after; }, world);
  }
  static std::vector<std::string> names_in(const fs::path& folder) {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder))
      names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }

  static constexpr int kSignal = 15;
  TemporaryFolder folder_;
  Outcome outcome_ = Outcome::kFinished;
};

TEST_F(TrainerTest, LearnsAndTheSameSeedGivesTheSameBits) {
  const std::vector<double> losses = train(recipe("a"));
  EXPECT_LT(losses.back(), 0.8 * losses.front());
  EXPECT_EQ(losses, train(recipe("b")));
  EXPECT_EQ(final_weights(recipe("a")), final_weights(recipe("b")));
  Recipe other = recipe("c");
  other.seed = 1;
  EXPECT_NE(losses, train(other));
}

TEST_F(TrainerTest, HowAStepIsPackedChangesNothingButRounding) {
  const std::vector<double> one_row = train(recipe("a"));
  Recipe rows = recipe("b");
  rows.stages[0].max_tokens_per_micro_batch = 1;  // each sample by itself
  const std::vector<double> four_rows = train(rows);
  for (size_t i = 0; i < one_row.size(); ++i) EXPECT_NEAR(four_rows[i], one_row[i], 1e-5 * one_row[i]) << i;
}

TEST_F(TrainerTest, MicroBatchMeanWeighsRowsAlikeAsLlavaDoes) {
  Recipe rows = recipe("a");
  rows.stages[0].max_tokens_per_micro_batch = 1;
  rows.stages[0].max_steps = 1;
  const double token_mean = train(rows)[0];
  rows.output = recipe("b").output;
  rows.stages[0].loss = "micro_batch_mean";
  EXPECT_NE(token_mean, train(rows)[0]);  // answers of different lengths
}

TEST_F(TrainerTest, GradientCheckpointingChangesNoBit) {
  Recipe recomputed = recipe("b");
  recomputed.stages[0].gradient_checkpointing = true;
  EXPECT_EQ(train(recipe("a")), train(recomputed));
  EXPECT_EQ(final_weights(recipe("a")), final_weights(recomputed));
}

TEST_F(TrainerTest, StoppedAfterAnyStepItGoesOnBitForBit) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    Recipe straight = recipe(std::string("straight_") + dtype);
    straight.stages[0].dtype = dtype;
    straight.stages[0].global_batch_size = 3;  // steps of 3 and 1 samples: epochs end inside the run
    const std::vector<double> expected = train(straight);
    for (int at = 1; at < 6; ++at) {
      Recipe stopped = straight;
      stopped.output = recipe(fmt::format("stopped_{}_{}", dtype, at)).output;
      int steps = 0;
      std::vector<double> losses = train(stopped, "auto", [&] { return ++steps == at; });
      EXPECT_EQ(outcome_, Outcome::kStopped);
      const std::vector<double> rest = train(stopped);
      losses.insert(losses.end(), rest.begin(), rest.end());
      EXPECT_EQ(losses, expected) << at;
      EXPECT_EQ(final_weights(stopped), final_weights(straight)) << at;
    }
  }
}

TEST_F(TrainerTest, ASignalInAStagesLastStepStopsBehindItsModel) {
  Recipe two = recipe("a");
  two.stages.push_back(two.stages[0]);
  two.stages[1].name = "second";
  const fs::path output = two.output;
  int steps = 0;
  EXPECT_EQ(train(two, "auto", [&] { return ++steps == 6; }).size(), 6u);
  EXPECT_EQ(outcome_, Outcome::kStopped);
  EXPECT_TRUE(fs::exists(output / "finetune" / "final"));
  EXPECT_FALSE(fs::exists(output / "second"));
  steps = 0;
  EXPECT_EQ(train(two, "auto", [&] { return ++steps == 6; }).size(), 6u);
  EXPECT_EQ(outcome_, Outcome::kStopped) << "the run's last step, too";
  EXPECT_TRUE(fs::exists(output / "second" / "final"));
  EXPECT_EQ(train(two).size(), 0u);
  EXPECT_EQ(outcome_, Outcome::kFinished);
}

TEST_F(TrainerTest, ASignalWhileTheModelIsBuiltStopsBeforeTheFirstStep) {
  const Recipe stopped = recipe("a");
  Recorder recorder;
  const auto start = [&] { return run_recipe(stopped, {}, recorder, [] { return kSignal; }); };
  EXPECT_EQ(start(), Outcome::kStopped);
  EXPECT_FALSE(fs::exists(fs::path(stopped.output) / "finetune" / "checkpoints"));
  int steps = 0;
  train(stopped, "auto", [&] { return ++steps == 2; });
  EXPECT_EQ(start(), Outcome::kStopped);  // what is there is saved already
  EXPECT_TRUE(recorder.losses.empty());
  EXPECT_EQ(train(stopped).size(), 4u);
}

TEST_F(TrainerTest, FurtherAttemptsOfARunDoNotStartAnewAgain) {
  const Recipe anew = recipe("a");
  const fs::path output = anew.output;
  train(anew);
  EXPECT_EQ(train_attempt(0, "run", anew, "never", 2).size(), 2u);
  EXPECT_EQ(train_attempt(1, "run", anew, "never").size(), 4u);
  EXPECT_EQ(train_attempt(2, "run", anew, "never").size(), 0u);
  EXPECT_FALSE(fs::exists(output / "finetune.old-2"));
  EXPECT_EQ(final_weights(anew), read_file(output / "finetune.old-1" / "final" / "model.safetensors"));
  // An attempt that nothing is known of, and another run.
  EXPECT_EQ(train_attempt(1, "other", anew, "never").size(), 6u);
  EXPECT_TRUE(fs::exists(output / "finetune.old-2" / "final"));
  EXPECT_EQ(train_attempt(0, "other", anew, "never").size(), 6u);
  EXPECT_TRUE(fs::exists(output / "finetune.old-3" / "final"));
}

TEST_F(TrainerTest, FurtherAttemptsOfARunDoNotGoBackAgain) {
  Recipe back = recipe("a");
  back.stages[0].save_steps = 1;
  back.stages[0].save_total_limit = 10;
  const fs::path stage = fs::path(back.output) / "finetune", checkpoints = stage / "checkpoints";
  int steps = 0;
  train(back, "auto", [&] { return ++steps == 5; });
  const std::string second = (checkpoints / "step-00000002/").string();
  EXPECT_EQ(train_attempt(0, "run", back, second, 1).size(), 1u);
  EXPECT_EQ(names_in(checkpoints),
            (std::vector<std::string>{"step-00000001", "step-00000002", "step-00000003"}));
  EXPECT_EQ(names_in(stage / "checkpoints.old-1"),
            (std::vector<std::string>{"step-00000003", "step-00000004", "step-00000005"}));
  EXPECT_EQ(train_attempt(1, "run", back, second).size(), 3u);
  EXPECT_EQ(train_attempt(2, "run", back, second).size(), 0u);
  EXPECT_FALSE(fs::exists(stage / "checkpoints.old-2"));
}

// Until its first save, the run's only checkpoint is where it was told to go on from; and another stage never
// goes on from it.
TEST_F(TrainerTest, FurtherAttemptsStartFromACheckpointElsewhereUntilTheyHaveTheirOwn) {
  Recipe two = recipe("a");
  two.stages.push_back(two.stages[0]);
  two.stages[1].name = "second";
  int steps = 0;
  train(two, "auto", [&] { return ++steps == 4; });
  const std::string elsewhere = (fs::path(two.output) / "finetune/checkpoints/step-00000004").string();
  two.output = recipe("b").output;
  steps = 0;
  train(two, "auto", [&] { return ++steps == 3; });  // in the way
  const auto fails_at_once = [&] {
    World world(spec_of(0, "run"), at::kCPU, 20, {});
    Recorder recorder;
    run_recipe(two, {.resume = elsewhere, .world = &world}, recorder, [] { return kSignal; });
  };
  fails_at_once();
  EXPECT_EQ(names_in(fs::path(two.output) / "finetune/checkpoints.old-1"),
            std::vector<std::string>{"step-00000003"});
  EXPECT_EQ(train_attempt(1, "run", two, elsewhere, 1).size(), 1u);
  EXPECT_EQ(train_attempt(2, "run", two, elsewhere, 1).size(), 1u);
  EXPECT_TRUE(fs::exists(fs::path(two.output) / "finetune/final"));
  EXPECT_EQ(train_attempt(3, "run", two, elsewhere).size(), 6u);
}

TEST_F(TrainerTest, OnlyWhatTrainsChanges) {
  Recipe projector = recipe("a");
  projector.stages[0].trainable = {"projector"};
  projector.stages[0].optimizer.warmup_ratio = 0;
  train(projector);
  const auto before = build_llava(build_spec_of(projector, 0));
  const auto after = open_weights_folder(fs::path(projector.output) / "finetune" / "final");
  for (const NamedTensor& tensor : before->tensors()) {
    const at::Tensor now = after->read(tensor.name);
    const bool trains = tensor.name.starts_with("multi_modal_projector");
    EXPECT_EQ(at::equal(now.narrow(0, 0, tensor.value().size(0)), tensor.value()), !trains) << tensor.name;
  }
}

TEST_F(TrainerTest, ASecondStageStartsFromWhatTheFirstTrained) {
  Recipe two = recipe("a");
  two.stages.insert(two.stages.begin(), two.stages[0]);
  two.stages[0].name = "pretrain";
  two.stages[0].trainable = {"projector"};
  train(two);
  const auto first = open_weights_folder(fs::path(two.output) / "pretrain" / "final");
  const auto start = build_llava(build_spec_of(two, 1));
  for (const NamedTensor& tensor : start->component_tensors("projector"))
    EXPECT_TRUE(at::equal(tensor.value(), first->read(tensor.name))) << tensor.name;
}

TEST_F(TrainerTest, ANonFiniteLossStopsWithTheSamplesNamed) {
  Recipe wild = recipe("a");
  const fs::path weights = folder_.path() / "parts" / "language" / "model.safetensors";
  const auto model = build_llava(build_spec_of(wild, 0));
  TensorList tensors;
  for (const NamedTensor& tensor : model->language->tensors())
    tensors.emplace_back(tensor.name, tensor.value().clone());
  for (auto& [name, value] : tensors)
    if (name == "model.norm.weight") value[0] = std::numeric_limits<float>::max();
  write_safetensors(weights, tensors);
  EXPECT_THAT([&] { train(wild); }, ThrowsMessage<Error>(HasSubstr("not finite. Weights are as before this step")));
  EXPECT_THAT([&] { train(wild); }, ThrowsMessage<Error>(HasSubstr("q0")));
  EXPECT_FALSE(fs::exists(fs::path(wild.output) / "finetune" / "final"));
}

TEST_F(TrainerTest, ARecordOfWhichNothingIsLeftIsPassedOverAtItsStep) {
  Json records = read_json(folder_.path() / "test.json");
  std::string& question = records[2]["conversations"][0]["value"].get_ref<std::string&>();
  for (int i = 0; i < 1000; ++i) question += " and";
  write_json(folder_.path() / "test.json", records);
  Recipe one_each = recipe("a");
  one_each.stages[0].global_batch_size = 1;
  const std::vector<double> losses = train(one_each);
  ASSERT_EQ(losses.size(), 6u);
  const auto num_empty = std::count(losses.begin(), losses.end(), 0.0);
  EXPECT_THAT(num_empty, testing::AllOf(testing::Ge(1), testing::Le(2))) << "of one epoch and a half of four records";
  const std::string metrics = read_file(fs::path(one_each.output) / "finetune" / "metrics.jsonl");
  EXPECT_THAT(metrics, HasSubstr("\"num_passed_over\":1"));

  // The same where the run goes on in the middle.
  one_each.output = (folder_.path() / "b").string();
  int steps = 0;
  std::vector<double> in_parts = train(one_each, "auto", [&] { return ++steps == 3; });
  for (const double loss : train(one_each)) in_parts.push_back(loss);
  EXPECT_EQ(in_parts, losses);
}

TEST_F(TrainerTest, AChangedRecipeIsNotResumed) {
  Recipe changed = recipe("a");
  int steps = 0;
  train(changed, "auto", [&] { return ++steps == 2; });
  changed.stages[0].optimizer.learning_rate = 5e-3;
  EXPECT_THAT([&] { train(changed); },
              ThrowsMessage<ConfigError>(HasSubstr("the recipe now says \"learning_rate: 0.005\"")));
  EXPECT_THAT(read_file(fs::path(changed.output) / "recipe.yaml"), HasSubstr("learning_rate: 0.01"));
  changed.stages[0].optimizer.learning_rate = 1e-2;
  // These touch nothing that is computed.
  changed.stages[0].save_steps = 1;
  changed.stages[0].gradient_checkpointing = true;
  changed.stages[0].memory = {.budget_gb = 1000, .offload_optimizer = true, .offload_activations = true};
  EXPECT_EQ(train(changed).size(), 4u);
}

// A run that moves to another processor goes on in the dtype in which it was begun.
TEST_F(TrainerTest, DtypeAutoIsDecidedWhereTheStageBegins) {
  Recipe automatic = recipe("a");
  automatic.device = "cpu";
  automatic.stages[0].dtype = "auto";
  const std::string here = trains_fastest_in() == at::kBFloat16 ? "bfloat16" : "float32";
  const std::string other = here == "float32" ? "bfloat16" : "float32";
  EXPECT_EQ(choose_dtypes(automatic).stages[0].dtype, here);
  Recipe begun = automatic;
  begun.stages[0].dtype = other;
  int steps = 0;
  train(begun, "auto", [&] { return ++steps == 2; });
  EXPECT_EQ(choose_dtypes(automatic).stages[0].dtype, other);
  EXPECT_EQ(choose_dtypes(automatic, {.resume = "never"}).stages[0].dtype, here);
  const fs::path checkpoint = fs::path(begun.output) / "finetune/checkpoints/step-00000002";
  ASSERT_TRUE(fs::exists(checkpoint));
  automatic.output = (fs::path(automatic.output).parent_path() / "elsewhere").string();
  EXPECT_EQ(choose_dtypes(automatic, {.resume = checkpoint.string() + "/"}).stages[0].dtype, other);
  EXPECT_EQ(choose_dtypes(automatic).stages[0].dtype, here);
  automatic.output = begun.output;  // only the stage that is asked for begins anew
  EXPECT_EQ(choose_dtypes(automatic, {.only_stage = "another", .resume = "never"}).stages[0].dtype, other);
  automatic.output = "nowhere";
  automatic.device = "cuda";  // planned without a GPU, too
  EXPECT_EQ(choose_dtypes(automatic).stages[0].dtype, "bfloat16");
}

TEST_F(TrainerTest, AFinishedStageOfAChangedRecipeIsNotReused) {
  Recipe two = recipe("a");
  two.stages.push_back(two.stages[0]);
  two.stages[1].name = "second";
  train(two);
  const fs::path output = two.output;
  // An option of earlier versions is no change.
  const std::string yaml = read_file(output / "finetune" / "recipe.yaml");
  const size_t line = yaml.find("  eval_steps:");
  ASSERT_NE(line, std::string::npos);
  write_file_atomic(output / "finetune" / "recipe.yaml",
                    yaml.substr(0, line) + "  logging_steps: 1\n" + yaml.substr(line));
  two.stages[0].save_steps = 7;
  two.stages[0].memory.offload_activations = true;
  EXPECT_EQ(train(two).size(), 0u);

  two.stages[0].optimizer.learning_rate = 5e-3;
  const std::string before = read_file(output / "recipe.yaml");
  EXPECT_THAT([&] { train(two); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("finetune/recipe.yaml: stage finetune was begun with"),
                                               HasSubstr("the recipe now says \"learning_rate: 0.005\""),
                                               HasSubstr("--resume never"))));
  // The second stage alone would start from it too.
  Recorder recorder;
  EXPECT_THROW(run_recipe(two, {.only_stage = "second"}, recorder, [] { return 0; }), ConfigError);
  EXPECT_EQ(read_file(output / "recipe.yaml"), before);
  EXPECT_EQ(train(two, "never").size(), 12u);
}

TEST_F(TrainerTest, ACheckpointsFolderIsOfTheFirstStageThatIsNotFinished) {
  Recipe two = recipe("a");
  two.stages.push_back(two.stages[0]);
  two.stages[1].name = "second";
  two.stages[0].save_total_limit = 2;
  two.stages[0].save_steps = 2;
  int steps = 0;
  train(two, "auto", [&] { return ++steps == 3; });
  const fs::path step = fs::path(two.output) / "finetune" / "checkpoints" / "step-00000002";
  EXPECT_EQ(train(two, step.string()).size(), 4u + 6u);
  EXPECT_EQ(outcome_, Outcome::kFinished);
  EXPECT_TRUE(fs::exists(fs::path(two.output) / "finetune" / "checkpoints.old-1" / "step-00000003"));
}

TEST_F(TrainerTest, DataOfAnotherLengthIsNotResumed) {
  const Recipe stopped = recipe("a");
  int steps = 0;
  train(stopped, "auto", [&] { return ++steps == 2; });
  Json records = read_json(folder_.path() / "test.json");
  records.erase(3);
  write_json(folder_.path() / "test.json", records);
  EXPECT_THAT([&] { train(stopped); },
              ThrowsMessage<DataError>(AllOf(HasSubstr("was begun with 4 samples"),
                                             HasSubstr("test.json now holds 3"))));
  // Older checkpoints do not say how many there were.
  const fs::path step = fs::path(stopped.output) / "finetune" / "checkpoints" / "step-00000002";
  Json state = read_json(step / "trainer_state.json"), manifest = read_json(step / "manifest.json");
  state.erase("num_samples");
  manifest["files"].erase("trainer_state.json");
  write_json(step / "trainer_state.json", state);
  write_json(step / "manifest.json", manifest);
  EXPECT_EQ(train(stopped).size(), 4u);
}

TEST_F(TrainerTest, StartingAnewMovesWhatIsThereAside) {
  train(recipe("a"));
  EXPECT_EQ(train(recipe("a")).size(), 0u);  // finished
  EXPECT_EQ(train(recipe("a"), "never").size(), 6u);
  EXPECT_TRUE(fs::exists(fs::path(recipe("a").output) / "finetune.old-1" / "final"));
}

TEST_F(TrainerTest, WhatCanBeKnownBeforeIsSaidBeforeTheFirstStep) {
  Recipe two = recipe("a");
  two.stages.push_back(two.stages[0]);
  two.stages[1].name = "second";
  fs::remove(folder_.path() / "images" / "red.png");
  EXPECT_THAT([&] { train(two); }, ThrowsMessage<DataError>(HasSubstr("red.png")));
  EXPECT_FALSE(fs::exists(fs::path(two.output) / "finetune" / "metrics.jsonl"));
}

TEST_F(TrainerTest, TheEvaluationsDataIsCheckedBeforeTheFirstStep) {
  Recipe evaluated = recipe("a");
  evaluated.evaluation = EvaluationConfig{.data_path = (folder_.path() / "absent.json").string(),
                                          .image_folder = (folder_.path() / "images").string(),
                                          .conversation_template = "v1"};
  EXPECT_THAT([&] { train(evaluated); }, ThrowsMessage<DataError>(HasSubstr("absent.json")));
  evaluated.evaluation->data_path = (folder_.path() / "test.json").string();
  Json records = read_json(folder_.path() / "test.json");
  records[1]["conversations"].erase(1);
  write_json(folder_.path() / "captions.json", records);
  evaluated.evaluation->captions_path = (folder_.path() / "captions.json").string();
  EXPECT_THAT([&] { train(evaluated); },
              ThrowsMessage<DataError>(HasSubstr("captions.json: record 1 (id \"q1\"): no answer")));
  EXPECT_FALSE(fs::exists(evaluated.output));
  evaluated.evaluation->captions_path = "";
  EXPECT_EQ(train(evaluated).size(), 6u);
}

TEST_F(TrainerTest, ARecordThatTheTemplateRefusesIsNamedBeforeTheFirstStep) {
  Json records = read_json(folder_.path() / "test.json");
  Json& turns = records[2]["conversations"];
  turns.push_back({{"from", "human"}, {"value", "And?"}});
  turns.push_back({{"from", "gpt"}, {"value", "No more."}});
  write_json(folder_.path() / "test.json", records);
  Recipe plain = recipe("a");
  EXPECT_EQ(train(plain).size(), 6u);
  plain.output = recipe("b").output;
  plain.stages[0].data.conversation_template = "plain";
  EXPECT_THAT([&] { train(plain); },
              ThrowsMessage<DataError>(AllOf(HasSubstr("test.json: record 2 (id \"q2\"): template plain"),
                                             HasSubstr("got 4 turns"))));
  EXPECT_FALSE(fs::exists(plain.output));
}

TEST_F(TrainerTest, ValidationDataWithNothingToLearnIsRefused) {
  Json records = read_json(folder_.path() / "test.json");
  Json& question = records[0]["conversations"][0]["value"];
  question = question.get<std::string>() + std::string(1000, 'x');  // its answer is cut off
  write_json(folder_.path() / "eval.json", Json::array({records[0]}));
  Recipe validated = recipe("a");
  validated.stages[0].data.eval_data_path = (folder_.path() / "eval.json").string();
  EXPECT_THAT([&] { train(validated); },
              ThrowsMessage<DataError>(HasSubstr("eval.json: its 1 samples have no validation loss")));
}

}  // namespace
}  // namespace caldera
