#include "eval/heldout.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "eval/model_session.h"
#include "eval/report.h"
#include "eval/score.h"
#include "tests/eval/tiny_model.h"

namespace caldera {
namespace {

using ::testing::ElementsAre;

Record question(const std::string& image, const std::string& text, const std::string& answer,
                const std::string& type = "") {
  return {.id = image + text,
          .images = {image},
          .turns = {{true, "<image>\n" + text}, {false, answer}},
          .type = type};
}

TEST(NormalizeAnswer, ForgetsCaseSpacesAndAFinalPeriod) {
  EXPECT_EQ(normalize_answer("  Red. \n"), "red");
  EXPECT_EQ(normalize_answer("A  red\tsquare"), "a red square");
  EXPECT_EQ(normalize_answer("3.5"), "3.5");
  EXPECT_EQ(normalize_answer("red . "), "red");
  EXPECT_EQ(normalize_answer(""), "");
  EXPECT_NE(normalize_answer("red"), normalize_answer("not red"));
  EXPECT_EQ(normalize_answer("\xC3\x89t\xC3\xA9"), "\xC3\x89t\xC3\xA9");  // letters beyond ASCII stay whole
}

TEST(OtherPictures, EveryRecordGetsAnotherPictureAlsoWherePicturesRepeat) {
  const std::vector<Record> records = {question("a", "1", "x"), question("a", "2", "x"),
                                       question("b", "1", "x"), question("c", "1", "x"),
                                       question("b", "2", "x")};
  const std::vector<Record> others = with_other_pictures(records);
  ASSERT_EQ(others.size(), records.size());
  for (size_t i = 0; i < records.size(); ++i) {
    EXPECT_NE(others[i].images[0], records[i].images[0]);
    EXPECT_EQ(others[i].turns[0].value, records[i].turns[0].value);
  }
  EXPECT_EQ(others[0].images[0], "b");
  EXPECT_EQ(others[3].images[0], "a");
}

TEST(OtherPictures, NoneWhereAllShowOne) {
  EXPECT_TRUE(with_other_pictures({question("a", "1", "x"), question("a", "2", "y")}).empty());
}

TEST(BlindAnswers, MajorityPerQuestion) {
  const std::vector<Record> records = {question("a", "Colour?", "red"),  question("b", "Colour?", "Red."),
                                       question("c", "Colour?", "blue"), question("d", "Count?", "2"),
                                       question("e", "Count?", "3"),     question("f", "Count?", "3")};
  EXPECT_THAT(blind_answers(records), ElementsAre("red", "red", "red", "3", "3", "3"));
}

TEST(BlindAnswers, ATieGoesToTheFirstInTheAlphabet) {
  const std::vector<Record> records = {question("a", "Q?", "yes"), question("b", "Q?", "no")};
  EXPECT_THAT(blind_answers(records), ElementsAre("no", "no"));
}

TEST(BlindAnswers, WhereAllQuestionsDifferTheirTypeDecides) {
  const std::vector<Record> records = {question("a", "Is the cat black?", "yes", "yes_no"),
                                       question("b", "Is the dog brown?", "yes", "yes_no"),
                                       question("c", "Is the hen white?", "no", "yes_no"),
                                       question("d", "What is that?", "a boat", "object")};
  EXPECT_THAT(blind_answers(records), ElementsAre("yes", "yes", "yes", "a boat"));
}

TEST(BlindAnswers, OneQuestionAmongRepeatedOnesIsItsOwnMajority) {
  const std::vector<Record> records = {question("a", "Colour?", "red"), question("b", "Colour?", "red"),
                                       question("c", "Count?", "2")};
  EXPECT_THAT(blind_answers(records), ElementsAre("red", "red", "2"));
}

class Heldout : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder();
    write_tiny_model(folder_->path() / "model");
    write_tiny_data(folder_->path());
  }
  static void TearDownTestSuite() { delete folder_; }
  static EvaluationConfig config() {
    return {.data_path = (folder_->path() / "test.json").string(),
            .image_folder = (folder_->path() / "images").string(),
            .max_new_tokens = 4};
  }
  static HeldoutResult evaluate(ModelSession& session, const EvaluationConfig& config) {
    return evaluate_heldout(*session.model, session.format, config, read_heldout(config));
  }
  static TemporaryFolder* folder_;
};
TemporaryFolder* Heldout::folder_ = nullptr;

TEST_F(Heldout, LikelihoodsAreThoseOfScoringAndAnswersAreCounted) {
  ModelSession session = open_model({.model = folder_->path() / "model", .device = "cpu"});
  const HeldoutResult result = evaluate(session, config());

  const std::vector<Record> records = read_records(config().data_path);
  const auto per_token = [&](const std::vector<Record>& scored) {
    double sum = 0, num = 0;
    for (const Record& record : scored)  // one by one: batching must not matter
      for (const Score& score :
           score_records(*session.model, {record}, config().image_folder, session.format, 1)) {
        sum += score.nll_sum;
        num += static_cast<double>(score.num_supervised);
      }
    return sum / num;
  };
  EXPECT_NEAR(result.nll_right.value(), per_token(records), 1e-5);
  EXPECT_NEAR(result.nll_shuffled.value(), per_token(with_other_pictures(records)), 1e-5);
  EXPECT_NE(*result.nll_right, *result.nll_shuffled);  // the picture reaches the loss

  EXPECT_EQ(result.all.num_questions, 4);
  EXPECT_EQ(result.all.exact_match_blind(), 0.5);
  EXPECT_EQ(result.by_type.at("colour").num_questions, 2);
  EXPECT_EQ(result.by_held_out.at(true).num_questions, 2);
  EXPECT_EQ(result.answers[1].question, "Is it red?");
  EXPECT_EQ(result.answers[1].expected, "yes");

  const Json json = to_json(result, 12.5);
  for (const char* key : {"nll_right", "nll_shuffled", "exact_match", "exact_match_blind", "by_type",
                          "num_questions", "train_seconds"})
    EXPECT_TRUE(json.contains(key)) << key;
  EXPECT_EQ(json["by_type"]["yes_no"]["num_questions"], 2);
  EXPECT_EQ(json["train_seconds"], 12.5);
}

TEST_F(Heldout, DrawsAtMostWhatWasAsked) {
  ModelSession session = open_model({.model = folder_->path() / "model", .device = "cpu"});
  EvaluationConfig few = config();
  few.max_questions = 3;
  EXPECT_EQ(evaluate(session, few).answers.size(), 3u);
}

TEST_F(Heldout, EachRecordsOwnMarkCountsAlsoWhereIdsRepeat) {
  const fs::path file = folder_->path() / "same_id.json";
  Json records = read_json(folder_->path() / "test.json");
  for (Json& record : records) record["id"] = "same";
  write_json(file, records);
  EvaluationConfig same = config();
  same.data_path = file.string();
  ModelSession session = open_model({.model = folder_->path() / "model", .device = "cpu"});
  const HeldoutResult result = evaluate(session, same);
  EXPECT_EQ(result.by_held_out.at(true).num_questions, 2);
  EXPECT_EQ(result.by_held_out.at(false).num_questions, 2);
}

TEST_F(Heldout, FaultsOfTheDataShowBeforeAModelIsOpened) {
  const fs::path file = folder_->path() / "faulty.json";
  const auto faults_of = [&](const Json& records, const std::string& captions = "") {
    write_json(file, records);
    EvaluationConfig faulty = config();
    faulty.data_path = captions.empty() ? file.string() : captions;
    faulty.captions_path = captions.empty() ? "" : file.string();
    return error_of<DataError>([&] { read_heldout(faulty); });
  };
  const Json question = {{"from", "human"}, {"value", "<image>\nWell?"}};
  const Json answer = {{"from", "gpt"}, {"value", "Well."}};
  const Json unanswered = {{{"id", "lonely"}, {"image", "red.png"}, {"conversations", {question}}}};
  EXPECT_THAT(faults_of(unanswered), ::testing::HasSubstr(file.string() + ": record 0 (id \"lonely\"): no answer"));
  const Json unseen = {{{"id", "unseen"}, {"image", "green.png"}, {"conversations", {question, answer}}}};
  for (const std::string& captions : {std::string(), config().data_path})
    EXPECT_THAT(faults_of(unseen, captions),
                ::testing::AllOf(::testing::HasSubstr(file.string()), ::testing::HasSubstr("id \"unseen\""),
                                 ::testing::HasSubstr("green.png")));
}

TEST_F(Heldout, TheReportStandsAlone) {
  ModelSession session = open_model({.model = folder_->path() / "model", .device = "cpu"});
  HeldoutResult result = evaluate(session, config());
  result.answers[0].given = "<script>alert(1)</script>";
  const fs::path out = folder_->path() / "run";
  fs::create_directories(out / "pretrain");
  write_file_atomic(
      out / "pretrain" / "metrics.jsonl",
      "{\"step\": 1, \"loss\": 3.5, \"step_ms\": 10, \"num_tokens\": 100}\n{\"step\": 2, \"loss\": 2.5}\n"
      "{\"step\": 2, \"eval_loss\": 2.75}\n{\"step\": 3, \"lo");
  write_report({.output = out,
                .model = out,
                .title = "Shapes & <colours>",
                .stages = {"pretrain"},
                .recipe_yaml = "seed: 0\n",
                .result = result,
                .image_folder = config().image_folder});
  const std::string html = read_file(out / "report.html");
  EXPECT_THAT(html, ::testing::HasSubstr("Shapes &amp; &lt;colours&gt;"));
  EXPECT_THAT(html, ::testing::HasSubstr("&lt;script&gt;alert(1)&lt;/script&gt;"));
  EXPECT_THAT(html, ::testing::Not(::testing::HasSubstr("<script")));
  EXPECT_THAT(html, ::testing::Not(::testing::HasSubstr("http")));  // nothing to fetch
  EXPECT_THAT(html, ::testing::HasSubstr("<svg"));
  EXPECT_THAT(html, ::testing::HasSubstr("data:image/png;base64,"));
  EXPECT_FALSE(cv::imread((out / "sheet.png").string()).empty());
}

}  // namespace
}  // namespace caldera
