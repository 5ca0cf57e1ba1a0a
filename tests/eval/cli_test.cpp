// The binary as a user meets it: real processes, their output and exit codes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <set>
#include <sstream>

#include "base/strings.h"
#include "eval/html.h"
#include "tests/eval/tiny_model.h"

namespace caldera {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

struct Outcome {
  int exit_code = -1;
  std::string out, err;
};

class Cli : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder();
    write_tiny_model(folder_->path() / "model");
    write_tiny_data(folder_->path());
  }
  static void TearDownTestSuite() { delete folder_; }

  static std::string at(const std::string& name) { return (folder_->path() / name).string(); }
  static Outcome run(const std::vector<std::string>& arguments, const std::string& redirect = "") {
    std::string command = CALDERA_BINARY;
    for (const std::string& argument : arguments) command += fmt::format(" {}", shell_quote(argument));
    command += fmt::format(" 2>{} </dev/null {}", shell_quote(at("stderr")), redirect);
    Outcome outcome;
    FILE* pipe = ::popen(command.c_str(), "r");
    std::array<char, 4096> buffer;
    for (size_t count; (count = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
      outcome.out.append(buffer.data(), count);
    outcome.exit_code = WEXITSTATUS(::pclose(pipe));
    outcome.err = read_file(at("stderr"));
    return outcome;
  }
  static std::vector<Json> lines(const std::string& name) {
    std::vector<Json> result;
    std::istringstream file(read_file(at(name)));
    for (std::string line; std::getline(file, line);) result.push_back(parse_json(line, name));
    return result;
  }
  // No temporary files of ours are left beside the results.
  static void expect_no_leftovers() {
    for (const auto& entry : fs::directory_iterator(folder_->path()))
      EXPECT_EQ(entry.path().string().find(".tmp-"), std::string::npos) << entry.path();
  }
  static TemporaryFolder* folder_;
};
TemporaryFolder* Cli::folder_ = nullptr;

TEST_F(Cli, VersionAndHelpAreOnStdout) {
  const Outcome version = run({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.out, StartsWith("caldera "));
  const Outcome help = run({"--help"});
  EXPECT_EQ(help.exit_code, 0);
  for (const char* name : {"train", "generate", "score", "export", "data", "eval", "recipe"})
    EXPECT_THAT(help.out, HasSubstr(name));
  EXPECT_THAT(run({"score", "--help"}).out, HasSubstr("--data"));
}

TEST_F(Cli, UsageErrorsExitWith2AndSayWhatIsKnown) {
  const Outcome unknown = run({"trainn"});
  EXPECT_EQ(unknown.exit_code, 2);
  EXPECT_THAT(unknown.out, IsEmpty());
  EXPECT_EQ(unknown.err, "error: unknown command \"trainn\"; did you mean \"train\"?\n");
  EXPECT_EQ(run({}).exit_code, 2);
  EXPECT_EQ(run({"data"}).exit_code, 2);
  const Outcome option =
      run({"score", "--model", at("model"), "--data", at("test.json"), "--out", at("x"), "--imgaes", "y"});
  EXPECT_EQ(option.exit_code, 2);
  EXPECT_THAT(option.err, HasSubstr("--imgaes"));
  EXPECT_EQ(run({"score", "--model", at("model")}).exit_code, 2);  // --data missing
  EXPECT_EQ(run({"generate", "--model", at("model"), "--prompt", "x", "--max-new-tokens", "many"}).exit_code,
            2);
  EXPECT_EQ(run({"generate", "--model", at("model"), "--prompt", "x", "--temperature", "-1"}).exit_code, 2);
  EXPECT_EQ(run({"generate", "--model", at("model")}).exit_code, 2);
  EXPECT_EQ(
      run({"generate", "--model", at("model"), "--prompt", "x", "--data", at("test.json"), "--out", at("x")})
          .exit_code,
      2);
  EXPECT_EQ(run({"generate", "--model", at("model"), "--data", at("test.json")}).exit_code,
            2);  // --out missing
}

TEST_F(Cli, UnknownValuesExitWith2) {
  const Outcome name = run({"generate", "--model", at("model"), "--prompt", "x", "--template", "v11"});
  EXPECT_EQ(name.exit_code, 2);
  EXPECT_THAT(name.err, HasSubstr("v11"));
  const Outcome dtype = run({"generate", "--model", at("model"), "--prompt", "x", "--dtype", "float8"});
  EXPECT_EQ(dtype.exit_code, 2);
  EXPECT_THAT(dtype.err, HasSubstr("float8"));
  EXPECT_EQ(run({"generate", "--model", at("model"), "--prompt", "x", "--device", "tpu"}).exit_code, 2);
  const Outcome format = run({"export", "--model", at("model"), "--format", "onnx", "--out", at("onnx")});
  EXPECT_EQ(format.exit_code, 2);
  EXPECT_THAT(format.err, HasSubstr("hf"));
  EXPECT_EQ(run({"export", "--model", at("model"), "--dtype", "int3", "--out", at("onnx")}).exit_code, 2);
  EXPECT_EQ(run({"export", "--model", at("model"), "--part", "ears", "--out", at("onnx")}).exit_code, 2);
  EXPECT_FALSE(fs::exists(at("onnx")));
  EXPECT_EQ(run({"generate", "--model", at("model"), "--prompt", "<image> <image>", "--image",
                 at("images/red.png")})
                .exit_code,
            2);
}

TEST_F(Cli, BrokenDataExitsWith3AndNamesTheFile) {
  write_file_atomic(at("broken.json"), "[{\"id\": 1,");
  const Outcome broken = run({"data", "check", "--data", at("broken.json"), "--images", at("images")});
  EXPECT_EQ(broken.exit_code, 3) << broken.err;
  EXPECT_THAT(broken.err, HasSubstr(at("broken.json")));
  EXPECT_EQ(run({"data", "check", "--data", at("nowhere.json"), "--images", at("images")}).exit_code, 3);
  const Outcome pictures = run({"data", "check", "--data", at("test.json"), "--images", at("nowhere")});
  EXPECT_EQ(pictures.exit_code, 3) << pictures.err;
  EXPECT_THAT(pictures.err, HasSubstr("red.png"));
  write_file_atomic(at("note.png"), "not a picture");
  const Outcome picture =
      run({"generate", "--model", at("model"), "--prompt", "x", "--image", at("note.png")});
  EXPECT_EQ(picture.exit_code, 3) << picture.err;
  EXPECT_THAT(picture.err, HasSubstr("note.png"));
}

TEST_F(Cli, ABadModelFolderExitsWith4AndIsNamed) {
  const Outcome missing = run({"generate", "--model", at("nowhere"), "--prompt", "x"});
  EXPECT_EQ(missing.exit_code, 4) << missing.err;
  EXPECT_THAT(missing.err, HasSubstr(at("nowhere")));
  EXPECT_EQ(run({"score", "--model", at("images"), "--data", at("test.json"), "--images", at("images"),
                 "--out", at("x")})
                .exit_code,
            4);
  EXPECT_EQ(run({"export", "--model", at("nowhere"), "--out", at("x")}).exit_code, 4);
  EXPECT_EQ(run({"data", "preview", "--data", at("test.json"), "--model", at("nowhere"), "--template", "v1",
                 "--out", at("x")})
                .exit_code,
            4);
  fs::create_directories(at("bent"));
  write_file_atomic(at("bent/config.json"), "{");
  const Outcome bent = run({"generate", "--model", at("bent"), "--prompt", "x"});
  EXPECT_EQ(bent.exit_code, 4) << bent.err;
  EXPECT_FALSE(fs::exists(at("x")));
  expect_no_leftovers();
}

TEST_F(Cli, FaultsOfTheDataShowBeforeTheModelIsOpened) {
  const std::vector<std::vector<std::string>> commands = {
      {"generate", "--out", at("x")}, {"score", "--out", at("x")}, {"eval", "heldout", "--out", at("x")}};
  for (std::vector<std::string> command : commands) {
    for (const std::string& more : {std::string("--model"), at("nowhere"), std::string("--data"),
                                    at("test.json"), std::string("--images"), at("nowhere")})
      command.push_back(more);
    const Outcome outcome = run(command);
    EXPECT_EQ(outcome.exit_code, 3) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr("red.png"));
  }
  EXPECT_FALSE(fs::exists(at("x")));
}

TEST_F(Cli, AnOverlongPromptIsNamedBeforeTheFirstAnswer) {
  Json records = read_json(at("test.json"));
  records.back()["id"] = "endless";
  records.back()["conversations"][0]["value"] = "<image>\n" + std::string(600, 'x');
  write_json(at("endless.json"), records);
  const Outcome outcome = run({"generate", "--model", at("model"), "--data", at("endless.json"), "--images",
                               at("images"), "--out", at("x")});
  EXPECT_EQ(outcome.exit_code, 3) << outcome.err;
  EXPECT_THAT(outcome.err, StartsWith("error: record \"endless\": the prompt takes "));
  EXPECT_THAT(outcome.err, HasSubstr("and the model holds 512"));
}

TEST_F(Cli, GeneratePrintsTheAnswerAlone) {
  const std::vector<std::string> arguments = {"generate",           "--model",          at("model"),
                                              "--prompt",           "Which colour?",    "--image",
                                              at("images/red.png"), "--max-new-tokens", "6"};
  const Outcome first = run(arguments);
  EXPECT_EQ(first.exit_code, 0) << first.err;
  EXPECT_THAT(first.err, IsEmpty());
  EXPECT_THAT(first.out, ::testing::EndsWith("\n"));
  EXPECT_EQ(run(arguments).out, first.out);
}

TEST_F(Cli, ManyAnswersAreThoseOfOneByOne) {
  const Outcome many = run({"generate", "--model", at("model"), "--data", at("test.json"), "--images",
                            at("images"), "--out", at("answers.jsonl"), "--max-new-tokens", "6"});
  EXPECT_EQ(many.exit_code, 0) << many.err;
  EXPECT_THAT(many.out, IsEmpty());
  const std::vector<Json> answers = lines("answers.jsonl");
  ASSERT_EQ(answers.size(), 4u);
  EXPECT_EQ(answers[3]["id"], "q3");
  const Outcome one = run({"generate", "--model", at("model"), "--prompt", "Is it red?", "--image",
                           at("images/blue.png"), "--max-new-tokens", "6"});
  EXPECT_EQ(one.out, answers[3]["text"].get<std::string>() + "\n");
  expect_no_leftovers();
}

TEST_F(Cli, ScoresComeInInputOrderWhateverTheBatches) {
  const std::vector<std::string> arguments = {"score",         "--model",  at("model"),  "--data",
                                              at("test.json"), "--images", at("images"), "--dtype",
                                              "float32",       "--out"};
  const auto with = [&](std::vector<std::string> more) {
    std::vector<std::string> all = arguments;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  const Outcome together = run(with({at("scores.jsonl")}));
  EXPECT_EQ(together.exit_code, 0) << together.err;
  EXPECT_EQ(run(with({at("scores_1.jsonl"), "--max-tokens", "1"})).exit_code, 0);
  const std::vector<Json> packed = lines("scores.jsonl"), single = lines("scores_1.jsonl");
  ASSERT_EQ(packed.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(packed[i]["id"], fmt::format("q{}", i));
    EXPECT_EQ(packed[i]["num_tokens"], single[i]["num_tokens"]);
    EXPECT_GT(packed[i]["num_supervised"], 0);
    EXPECT_NEAR(packed[i]["nll_sum"].get<double>(), single[i]["nll_sum"].get<double>(), 1e-4);
  }
}

TEST_F(Cli, PreviewShowsWhatIsLearned) {
  const Outcome outcome = run({"data", "preview", "--data", at("test.json"), "--images", at("images"),
                               "--model", at("model"), "--template", "v1", "--out", at("preview.jsonl")});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  const Json sample = lines("preview.jsonl").at(0);
  EXPECT_EQ(sample["id"], "q0");
  EXPECT_EQ(sample["num_image_tokens"], 4);  // (32 / 16)^2
  const auto ids = sample["input_ids"].get<std::vector<int64_t>>(),
             labels = sample["labels"].get<std::vector<int64_t>>();
  ASSERT_EQ(ids.size(), labels.size());
  EXPECT_EQ(std::count(ids.begin(), ids.end(), -200), 1);
  EXPECT_EQ(ids.front(), 256);
  EXPECT_EQ(ids.back(), 257);
  EXPECT_EQ(labels.back(), 257);
  EXPECT_EQ(labels.front(), -100);

  // The same without any model: a tokenizer's folder says nothing of pictures.
  fs::create_directories(at("tokenizer"));
  write_byte_tokenizer(at("tokenizer"));
  EXPECT_EQ(run({"data", "preview", "--data", at("test.json"), "--model", at("tokenizer"), "--template", "v1",
                 "--out", at("preview_tokenizer.jsonl")})
                .exit_code,
            0);
  EXPECT_EQ(lines("preview_tokenizer.jsonl").at(0)["input_ids"], sample["input_ids"]);
  EXPECT_EQ(lines("preview_tokenizer.jsonl").at(0)["num_image_tokens"], 0);
}

TEST_F(Cli, PreviewCutsAsTrainingDoes) {
  EXPECT_EQ(run({"data", "preview", "--data", at("test.json"), "--model", at("model"), "--max-length", "20",
                 "--out", at("preview_cut.jsonl")})
                .exit_code,
            0);
  EXPECT_EQ(lines("preview_cut.jsonl").at(0)["input_ids"].size(),
            20u);  // the picture comes later and is left off
}

TEST_F(Cli, AnExportedModelScoresTheSame) {
  const Outcome exported =
      run({"export", "--model", at("model"), "--format", "hf", "--out", at("exported"), "--dtype", "f32"});
  EXPECT_EQ(exported.exit_code, 0) << exported.err;
  for (const char* name : {"model", "exported"})
    EXPECT_EQ(run({"score", "--model", at(name), "--data", at("test.json"), "--images", at("images"), "--out",
                   at(std::string(name) + ".jsonl")})
                  .exit_code,
              0);
  EXPECT_EQ(read_file(at("model.jsonl")), read_file(at("exported.jsonl")));
  EXPECT_EQ(run({"export", "--model", at("model"), "--part", "vision_tower", "--out", at("tower")}).exit_code,
            0);
  EXPECT_EQ(read_json(at("tower/config.json"))["model_type"], "clip_vision_model");
  EXPECT_EQ(
      run({"export", "--model", at("model"), "--part", "language_model", "--out", at("language")}).exit_code,
      0);
  EXPECT_TRUE(fs::exists(at("language/tokenizer.json")));
  expect_no_leftovers();
}

TEST_F(Cli, AnExportNeverReplacesOtherFiles) {
  const Outcome outcome = run({"export", "--model", at("model"), "--out", at("images")});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_TRUE(fs::exists(at("images/red.png")));
}

TEST_F(Cli, AnExportReplacesAnEarlierOneButNoModelFromElsewhere) {
  fs::copy(at("model"), at("base"), fs::copy_options::recursive);
  write_file_atomic(at("base/notes.txt"), "mine");
  write_file_atomic(at("base/adapter_config.json"), "{}");
  const auto contents = [&] {
    std::string all;
    for (const auto& entry : std::set<fs::path>(fs::directory_iterator(at("base")), {}))
      all += entry.filename().string() + read_file(entry);
    return all;
  };
  const auto refused = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"export", "--model", at("model"), "--out", at("base")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.exit_code, 2);
    return outcome.err;
  };
  const std::vector<std::vector<std::string>> formats = {{},
                                                         {"--part", "language_model"},
                                                         {"--format", "llava"},
                                                         {"--format", "gguf"},
                                                         {"--format", "peft"},
                                                         {"--format", "peft", "--merge"}};
  for (const char* foreign : {"", "[1]", "{\"written_by\": 5}", "{\"format\": \"onnx\"}", "{"}) {
    if (*foreign != '\0') write_file_atomic(at("base/export.json"), foreign);
    const std::string before = contents();
    for (const std::vector<std::string>& format : formats)
      EXPECT_THAT(refused(format), HasSubstr(at("base") + ": holds files that this command did not write"));
    EXPECT_EQ(contents(), before);
  }

  for (const std::vector<std::string>& format : std::vector(formats.begin(), formats.begin() + 4)) {
    std::vector<std::string> arguments = {"export", "--model", at("model"), "--out", at("again/")};
    arguments.insert(arguments.end(), format.begin(), format.end());
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;  // each replaces the one before
    EXPECT_EQ(read_json(at("again/export.json"))["written_by"], "caldera export");
  }
  expect_no_leftovers();
}

TEST_F(Cli, EvalWritesResultsAndReport) {
  const Outcome outcome = run({"eval", "heldout", "--model", at("model"), "--data", at("test.json"),
                               "--images", at("images"), "--max-new-tokens", "4", "--out", at("evaluation")});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(parse_json(outcome.out, "stdout")["num_questions"], 4);
  EXPECT_EQ(read_json(at("evaluation/results.json"))["num_questions"], 4);
  EXPECT_TRUE(fs::exists(at("evaluation/report.html")));
  EXPECT_TRUE(fs::exists(at("evaluation/sheet.png")));
}

TEST_F(Cli, ARunEndsWithItsEvaluationAndItsCheckpointsServeAsModels) {
  write_tiny_parts(at("parts"));
  std::string recipe =
      fmt::format("model: {{vision_tower: {0}/vision, language_model: {0}/language, "
                  "random_parts: [vision_tower, language_model]}}\noutput: {1}\nstages:\n",
                  at("parts"), at("run"));
  for (const char* stage : {"pretrain", "finetune"})
    recipe += fmt::format(
        "  - name: {0}\n    trainable: [projector]\n    global_batch_size: 2\n    max_steps: 3\n    "
        "save_steps: 2\n    data:\n"
        "      data_path: {1}\n      image_folder: {2}\n      conversation_template: v1\n      "
        "model_max_length: 400\n",
        stage, at("test.json"), at("images"));
  recipe += fmt::format(
      "evaluation: {{data_path: {}, image_folder: {}, conversation_template: v1, max_new_tokens: 3}}\n",
      at("ask.json"), at("images"));
  Json asked = {{{"id", "text"},
                 {"conversations",
                  {{{"from", "human"}, {"value", "Are you there?"}}, {{"from", "gpt"}, {"value", "yes"}}}}}};
  for (const Json& record : read_json(at("test.json"))) asked.push_back(record);
  write_json(at("ask.json"), asked);
  write_file_atomic(at("run.yaml"), recipe);
  const Outcome trained = run({"train", at("run.yaml")});
  ASSERT_EQ(trained.exit_code, 0) << trained.err;
  EXPECT_THAT(trained.err, HasSubstr(at("run/sheet.png")));
  EXPECT_THAT(trained.err,
              HasSubstr("--image " + shell_quote(at("images/red.png"))));  // not of the first record
  EXPECT_THAT(trained.out, IsEmpty());
  const Json results = read_json(at("run/results.json"));
  EXPECT_EQ(results["num_questions"], 5);
  EXPECT_GT(results["train_seconds"], 0);
  EXPECT_THAT(read_file(at("run/report.html")), HasSubstr("finetune"));
  EXPECT_EQ(read_json(at("run/finetune/final/caldera.json"))["card"]["conversation_template"], "v1");

  // A run's folder means its last stage's end; so does the last checkpoint, whose step is the last.
  const auto score = [&](const std::string& model) {
    const Outcome outcome = run({"score", "--model", at(model), "--data", at("test.json"), "--images",
                                 at("images"), "--out", at("run_scores.jsonl")});
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return read_file(at("run_scores.jsonl"));
  };
  const std::string scores = score("run");
  EXPECT_EQ(scores, score("run/finetune"));
  EXPECT_EQ(scores, score("run/finetune/final"));
  EXPECT_NE(scores, score("run/pretrain"));
  fs::path step;
  for (const auto& entry : fs::directory_iterator(at("run/finetune/checkpoints"))) step = entry.path();
  ASSERT_FALSE(step.empty());
  EXPECT_NE(score(fs::relative(step, at("")).string()), "");
  EXPECT_EQ(
      run({"data", "preview", "--data", at("test.json"), "--model", step.string(), "--out", at("step.jsonl")})
          .exit_code,
      0);
  EXPECT_EQ(lines("step.jsonl").at(0)["num_image_tokens"], 4);
  expect_no_leftovers();
}

TEST_F(Cli, ScenesAreMadeOnceForASeed) {
  const auto make = [&](const std::string& name, const char* seed) {
    return run({"data", "make-scenes", "--out", at(name), "--num-train", "6", "--num-test", "4", "--seed",
                seed})
        .exit_code;
  };
  EXPECT_EQ(make("scenes a", "1"), 0);  // a space in a path is part of it
  EXPECT_EQ(make("scenes_b", "1"), 0);
  EXPECT_EQ(make("scenes_c", "2"), 0);
  EXPECT_EQ(read_file(at("scenes a/finetune.json")), read_file(at("scenes_b/finetune.json")));
  EXPECT_NE(read_file(at("scenes a/finetune.json")), read_file(at("scenes_c/finetune.json")));
  const Outcome check =
      run({"data", "check", "--data", at("scenes a/finetune.json"), "--images", at("scenes a/images")});
  EXPECT_EQ(check.exit_code, 0) << check.err;
  EXPECT_THAT(check.out, HasSubstr("6 records"));
}

TEST_F(Cli, ScenesOfTooFewPixelsAreRefusedOnTheCommandLine) {
  const Outcome outcome = run({"data", "make-scenes", "--out", at("tiny_scenes"), "--image-size", "31"});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("--image-size"));
}

TEST_F(Cli, RecipeFaultsAreNamedWithTheirPlace) {
  write_file_atomic(at("bad.yaml"), "model:\n  vision_tower: a\n  language_model: b\nsead: 3\nstages: []\n");
  const Outcome bad = run({"recipe", "check", at("bad.yaml")});
  EXPECT_EQ(bad.exit_code, 2);
  EXPECT_THAT(bad.err, HasSubstr(at("bad.yaml") + ":4:1: "));
  EXPECT_THAT(bad.err, HasSubstr("did you mean \"seed\""));
  const Outcome reference = run({"recipe", "reference"});
  EXPECT_EQ(reference.exit_code, 0);
  EXPECT_THAT(reference.out, HasSubstr("learning_rate"));
}

TEST_F(Cli, AnOutputThatTakesNothingIsNoSuccess) {
  const Outcome full = run({"recipe", "reference"}, ">/dev/full");
  EXPECT_EQ(full.exit_code, 1);
  EXPECT_THAT(full.err, HasSubstr("cannot write"));
}

TEST_F(Cli, AnAdapterGoesOutAloneOrMergedAndIsAModel) {
  write_tiny_parts(folder_->path() / "parts");
  write_file_atomic(at("lora.yaml"),
                    fmt::format("model: {{vision_tower: {0}/parts/vision, language_model: {0}/parts/language, "
                                "random_parts: [vision_tower, language_model]}}\n"
                                "output: {0}/lora\n"
                                "device: cpu\n"
                                "stages:\n"
                                "- name: finetune\n"
                                "  trainable: [projector, language_model]\n"
                                "  max_steps: 3\n"
                                "  optimizer: {{learning_rate: 1e-2}}\n"
                                "  data: {{data_path: {0}/test.json, image_folder: {0}/images, conversation_template: v1}}\n",
                                folder_->path().string()));
  ASSERT_EQ(run({"train", at("lora.yaml"), "stages.finetune.lora.lora_r=3"}).exit_code, 0);
  const auto score = [](const std::string& model, const std::vector<std::string>& more = {}) {
    std::vector<std::string> arguments = {"score", "--model", model, "--data", at("test.json"), "--images", at("images"), "--out",
                                          at("lora.jsonl")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Outcome outcome = run(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return outcome.exit_code == 0 ? read_file(at("lora.jsonl")) : "";
  };
  const std::string expected = score(at("lora"));

  // The stage was the run's first: no folder of its base exists, but the adapter still knows how to build one.
  const Outcome exported = run({"export", "--model", at("lora"), "--format", "peft", "--out", at("adapter")});
  EXPECT_EQ(exported.exit_code, 0) << exported.err;
  EXPECT_THAT(exported.err, HasSubstr("the adapter names no base model"));
  EXPECT_EQ(read_json(at("adapter/adapter_config.json"))["r"], 3);
  EXPECT_EQ(score(at("adapter")), expected);
  EXPECT_EQ(run({"export", "--model", at("adapter"), "--format", "peft", "--merge", "--out", at("merged")}).exit_code, 0);
  EXPECT_EQ(score(at("merged")), expected);

  // With another base it is another model.
  const Outcome based = run({"export", "--model", at("lora"), "--format", "peft", "--model-base", at("model"), "--out", at("based")});
  EXPECT_EQ(based.exit_code, 0) << based.err;
  EXPECT_EQ(read_json(at("based/adapter_config.json"))["base_model_name_or_path"], at("model"));
  EXPECT_EQ(score(at("based")), score(at("adapter"), {"--model-base", at("model")}));

  const auto refused = [](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = {"export", "--out", at("refused")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Outcome outcome = run(arguments);
    EXPECT_NE(outcome.exit_code, 0);
    return outcome.err;
  };
  EXPECT_THAT(refused({"--model", at("model"), "--format", "peft"}), HasSubstr("no adapter: looked for adapter_config.json"));
  EXPECT_THAT(refused({"--model", at("lora"), "--format", "hf", "--merge"}), HasSubstr("--merge belongs to --format peft"));
  EXPECT_THAT(refused({"--model", at("lora"), "--format", "peft", "--part", "vision_tower"}), HasSubstr("--part vision_tower"));
  expect_no_leftovers();
}

}  // namespace
}  // namespace caldera
