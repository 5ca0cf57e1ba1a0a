#include "data/record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/data/fake_text.h"

namespace caldera {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<Record> read(const std::string& json, const std::string& name = "data.json",
                         Answers answers = Answers::kNeeded) {
  const TemporaryFolder folder;
  return read_records(folder.write(name, json), answers);
}
std::string error(const std::string& json, const std::string& name = "data.json") {
  return error_of<DataError>([&] { read(json, name); });
}

const std::string kTwoTurns = R"([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])";
std::string with_turns(const std::string& turns) {
  return R"([{"id": "x7", "conversations": )" + turns + "}]";
}

}  // namespace

TEST(Record, ReadsWhatLlavaReads) {
  const std::vector<Record> records = read(R"([
    {"id": "000", "image": "coco/a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                           {"from": "gpt", "value": "A \"c\u00e4t\"."}]},
    {"id": 17, "model": "", "conversations": )" +
                                               kTwoTurns + R"(},
    {"image": null, "type": "count", "conversations": )" +
                                               kTwoTurns + R"(},
    {"id": "many", "image": ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "<image> or <image>?"}]}
  ])",
                                           "data.json", Answers::kMayLack);
  ASSERT_EQ(records.size(), 4u);
  EXPECT_EQ(records[0].id, "000");
  EXPECT_THAT(records[0].images, ElementsAre("coco/a.jpg"));
  EXPECT_TRUE(records[0].turns[0].from_human);
  EXPECT_FALSE(records[0].turns[1].from_human);
  EXPECT_EQ(records[0].turns[1].value, "A \"c\u00e4t\".");
  EXPECT_EQ(records[1].id, "17");
  EXPECT_TRUE(records[1].images.empty());
  EXPECT_EQ(records[2].id, "2");  // its place, where it has none
  EXPECT_EQ(records[2].type, "count");
  EXPECT_THAT(records[3].images, ElementsAre("a.jpg", "b.jpg"));
}

TEST(Record, TellsWhatIsHeldOut) {
  const std::string same = R"({"id": "a", "conversations": )" + kTwoTurns;
  const auto records =
      read("[" + same + R"(, "held_out": true}, )" + same + R"(, "held_out": false}, )" + same + "}]");
  EXPECT_EQ(records[0].held_out, true);
  EXPECT_EQ(records[1].held_out, false);
  EXPECT_EQ(records[2].held_out, std::nullopt);
}

TEST(Record, JsonLinesAreTheSame) {
  const std::string line = R"({"id": "a", "conversations": )" + kTwoTurns + "}";
  EXPECT_EQ(read(line + "\n\n" + line + "\r\n", "data.jsonl").size(), 2u);
  EXPECT_THAT(error(line + "\n{\"id\": ", "data.jsonl"),
              AllOf(HasSubstr("data.jsonl: record 1"), HasSubstr("not valid JSON")));
}

TEST(Record, AFirstTurnFromGptIsDropped) {
  const auto records = read(with_turns(R"([{"from": "gpt", "value": "Hm"}, {"from": "human", "value": "Hi"},
                                           {"from": "gpt", "value": "Hello"}])"));
  ASSERT_EQ(records[0].turns.size(), 2u);
  EXPECT_EQ(records[0].turns[0].value, "Hi");
}

TEST(Record, AnAnswerIsNeededUnlessTheCallerWantsQuestions) {
  const std::string question = with_turns(R"([{"from": "human", "value": "Hi"}])");
  EXPECT_THAT(error(question), HasSubstr("data.json: record 0 (id \"x7\"): no answer: no turn from \"gpt\""));
  EXPECT_THAT(error(with_turns(R"([{"from": "gpt", "value": "Hm"}, {"from": "human", "value": "Hi"}])")),
              HasSubstr("no answer"));
  EXPECT_EQ(read(question, "data.json", Answers::kMayLack)[0].turns.size(), 1u);
}

TEST(Record, ASystemTurnIsKeptWithTheFirstOne) {
  const std::string rest = R"({"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Salut"}])";
  const std::string turn = R"({"from": "system", "value": "Speak French."}, )";
  const auto by_turn = read(with_turns("[" + turn + rest));
  ASSERT_EQ(by_turn[0].turns.size(), 2u);
  EXPECT_TRUE(by_turn[0].turns[0].from_human);
  EXPECT_EQ(by_turn[0].turns[0].system, "Speak French.");
  EXPECT_EQ(by_turn[0].turns[1].system, "");
  const std::string key = R"([{"id": "x7", "system": "Speak French.", "conversations": )";
  EXPECT_EQ(read(key + "[" + rest + "}]")[0].turns[0].system, "Speak French.");
  EXPECT_EQ(read(key + "[" + turn + rest + "}]")[0].turns[0].system, "Speak French.");
  // LLaVA drops an answer that comes first; behind a system turn, too.
  EXPECT_EQ(read(with_turns("[" + turn + R"({"from": "gpt", "value": "Hm"}, )" + rest))[0].turns.size(), 2u);

  EXPECT_THAT(error(key + R"([{"from": "system", "value": "Be brief."}, )" + rest + "}]"),
              HasSubstr("turn 0: another system message than \"system\" has"));
  EXPECT_THAT(error(with_turns(R"([{"from": "human", "value": "a"}, {"from": "system", "value": "b"}])")),
              HasSubstr("turn 1: from \"system\"; such a turn comes first"));
  EXPECT_THAT(error(with_turns(R"([{"from": "system", "value": "<image>"}, )" + rest)),
              HasSubstr("turn 0: <image> in a system message"));
}

TEST(Record, KeysOfOtherTrainersAreFollowedOrRefused) {
  const auto with_key = [](const std::string& key) {
    return R"([{"id": "x7", )" + key + R"(, "conversations": )";
  };
  const std::string question =
      R"([{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A"}]}])";
  EXPECT_THAT(read(with_key(R"("images": ["a.png"])") + question)[0].images, ElementsAre("a.png"));
  EXPECT_THAT(error(with_key(R"("images": ["a.png"], "image": "a.png")") + question),
              HasSubstr("both \"image\" and \"images\""));
  EXPECT_THAT(error(with_key(R"("images": [])") + question),
              HasSubstr("expected one <image> for each of its 0 images, got 1"));
  EXPECT_THAT(error(with_key(R"("images": [3])") + question),
              HasSubstr("an entry of \"images\": expected a string"));
  for (const char* key : {R"("video": "a.mp4")", R"("videos": ["a.mp4"])", R"("audio": "a.wav")",
                          R"("weight": 0.5)", R"("tools": "[{}]")", R"("chosen": {})"}) {
    const std::string name = std::string(key).substr(0, std::string(key).find(':'));
    EXPECT_THAT(error(with_key(key) + kTwoTurns + "}]"), HasSubstr("record 0 (id \"x7\"): " + name + ": "));
  }
  // What says nothing is nothing.
  for (const char* key :
       {R"("video": null)", R"("videos": [])", R"("tools": "")", R"("weight": 1)", R"("weight": 1.0)"})
    EXPECT_EQ(error(with_key(key) + kTwoTurns + "}]"), "accepted") << key;
  const auto answer_with = [](const std::string& key) {
    return with_turns(R"([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", )" + key + "}]");
  };
  EXPECT_THAT(error(answer_with(R"("loss": false)")), HasSubstr("turn 1: \"loss\": every answer is learned"));
  EXPECT_THAT(error(answer_with(R"("weight": 0)")), HasSubstr("turn 1: \"weight\""));
  EXPECT_EQ(error(answer_with(R"("loss": true, "weight": 1)")), "accepted");
}

TEST(Record, SaysWhatIsWrongWithJsonInItsWritersWords) {
  const auto value = [](const std::string& json) { return error(R"([{"id": "a", "score": )" + json + "}]"); };
  EXPECT_THAT(value("NaN"), HasSubstr("record 0: not valid JSON: NaN at its byte 21, which Python writes"));
  EXPECT_THAT(value("-Infinity"), HasSubstr("Infinity at its byte 22"));
  EXPECT_THAT(value("None"), HasSubstr("None at its byte 21: Python's word"));
  EXPECT_THAT(value("'x'"), HasSubstr("a single quote at its byte 21"));
  EXPECT_THAT(value("\"a\nb\""), HasSubstr("control character (byte 0x0a) inside a string"));
  EXPECT_THAT(value("\"hi \\ud83d there\""), HasSubstr("the lone surrogate \\ud83d at its byte 25"));
  EXPECT_THAT(value("\"hi \\ud83dthere \\ude00\""), HasSubstr("the lone surrogate \\ud83d"));
  EXPECT_THAT(value("\"hi \\ude00\""), HasSubstr("the lone surrogate \\ude00"));
  // Words and halves inside strings are text, and a pair is a character.
  EXPECT_EQ(read(R"([{"id": "NaN None 'x' \ud83d\ude00 \\ud83d", "score": 1e5, "conversations": )" +
                 kTwoTurns + "}]")[0]
                .id,
            "NaN None 'x' \U0001F600 \\ud83d");

  const std::string line = R"({"id": "a", "conversations": )" + kTwoTurns + "}\n";
  EXPECT_THAT(error(line + line),
              HasSubstr("got an object; a file of one record a line must be named .jsonl"));
  EXPECT_THAT(error("[" + line + "]", "data.jsonl"), HasSubstr("a file of one list must be named .json"));
  for (const bool has_mark : {true, false}) {
    std::string wide = has_mark ? "\xFF\xFE" : "";
    for (const char c : "[" + line + "]") wide += {c, '\0'};
    EXPECT_THAT(error(wide), HasSubstr("data.json: the file is UTF-16 or UTF-32 text, expected UTF-8"));
  }
}

TEST(Record, BrokenDocumentsNameThePlace) {
  EXPECT_THAT(error(""), HasSubstr("the file is empty"));
  EXPECT_THAT(error("{}"), HasSubstr("expected a list of records"));
  EXPECT_THAT(error("[]"), HasSubstr("no records"));
  EXPECT_THAT(error("[{\"id\": \"a\""), HasSubstr("cut off in record 0"));
  EXPECT_THAT(error("[" + with_turns(kTwoTurns).substr(1, with_turns(kTwoTurns).size() - 2)),
              HasSubstr("cut off in record 0"));
  EXPECT_THAT(error(with_turns(kTwoTurns) + "x"), HasSubstr("text after the list's end"));
  const std::string record = with_turns(kTwoTurns).substr(1, with_turns(kTwoTurns).size() - 2);
  EXPECT_THAT(error("[" + record + ",]"), HasSubstr("a comma before the list's end, behind 1 records"));
  EXPECT_THAT(error("[" + record + ",," + record + "]"), HasSubstr("record 1 is missing between two commas"));
  EXPECT_THAT(error("[" + record + ", {\"id\": tru}]"),
              AllOf(HasSubstr("data.json: record 1"), HasSubstr("not valid JSON")));
  EXPECT_THAT(error("[" + record + ", 5]"), HasSubstr("record 1: expected an object, got a number"));
  EXPECT_THAT(error("[{\"id\": \"\xFF\"}]"), HasSubstr("record 0: not valid JSON"));
  EXPECT_THAT(error("[" + std::string(2'000'000, '[')), HasSubstr("cut off"));
  EXPECT_THAT(error("[" + std::string(5000, '[') + std::string(5000, ']') + "]"),
              HasSubstr("record 0: not valid JSON"));
  EXPECT_THAT(error_of<DataError>([] { read_records("/nowhere/x.json"); }), HasSubstr("/nowhere/x.json"));
}

TEST(Record, EachFaultNamesFileRecordAndId) {
  const auto expect = [](const std::string& json, const std::string& what) {
    EXPECT_THAT(error(json), AllOf(HasSubstr("data.json: record 0 (id \"x7\"): "), HasSubstr(what)));
  };
  expect(R"([{"id": "x7"}])", "no \"conversations\"");
  expect(with_turns("3"), "\"conversations\": expected a list, got a number");
  expect(with_turns("[]"), "no turn from human");
  expect(with_turns("[4]"), "turn 0: expected an object");
  expect(with_turns(R"([{"from": "human"}])"), "turn 0: no \"value\"");
  expect(with_turns(R"([{"value": "a"}])"), "turn 0: no \"from\"");
  expect(with_turns(R"([{"from": "human", "value": 5}])"),
         "turn 0: \"value\": expected a string, got a number");
  expect(with_turns(R"([{"from": "user", "value": "a"}])"), "expected \"human\" or \"gpt\", got \"user\"");
  expect(R"([{"id": "x7", "messages": []}])", "got \"messages\": convert them");
  expect(with_turns(R"([{"from": "human", "value": "a"}, {"from": "human", "value": "a"}])"),
         "turn 1: expected \"gpt\", got \"human\"");
  expect(with_turns(R"([{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}])"),
         "turn 1: an empty answer");
  expect(with_turns(R"([{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}])"),
         "<image> in an answer");
  expect(with_turns(R"([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}])"),
         "expected one <image> for each of its 0 images, got 1");
  expect(R"([{"id": "x7", "image": "a.jpg", "conversations": )" + kTwoTurns + "}]",
         "expected one <image> for each of its 1 images, got 0");
  expect(R"([{"id": "x7", "image": {}, "conversations": )" + kTwoTurns + "}]",
         "\"image\": expected a path or a list of paths");
  expect(R"([{"id": "x7", "image": [1], "conversations": )" + kTwoTurns + "}]",
         "an entry of \"image\": expected a string");
  expect(R"([{"id": "x7", "image": "", "conversations": )" + kTwoTurns + "}]", "an empty path");
  expect(R"([{"id": "x7", "type": 1, "conversations": )" + kTwoTurns + "}]", "\"type\": expected a string");
  expect(R"([{"id": "x7", "held_out": "yes", "conversations": )" + kTwoTurns + "}]",
         "\"held_out\": expected true or false, got a string");
  EXPECT_THAT(error(R"([{"id": [], "conversations": )" + kTwoTurns + "}]"),
              HasSubstr("record 0: \"id\": expected a string"));
}

TEST(Record, ImagesStayBelowTheirFolder) {
  const TemporaryFolder outside, folder;
  outside.write("secret.png", "x");
  fs::create_directories(folder.path() / "sub");
  fs::create_symlink(outside.path(), folder.path() / "link");
  fs::create_symlink(outside.path() / "secret.png", folder.path() / "sub/link.png");
  fs::create_symlink(folder.path() / "sub", folder.path() / "inside");
  const auto refused = [&](const std::string& image) {
    return error_of<DataError>([&] { image_path(folder.path(), image); });
  };
  EXPECT_THAT(refused("../a.png"), HasSubstr("a path with \"..\""));
  EXPECT_THAT(refused("sub/../../a.png"), HasSubstr("a path with \"..\""));
  EXPECT_THAT(refused("/etc/passwd"), HasSubstr("an absolute path that lies elsewhere"));
  EXPECT_THAT(refused("link/secret.png"),
              HasSubstr("a link that leads out of the image folder, to " +
                        fs::canonical(outside.path()).string() + "/secret.png: name"));
  EXPECT_THAT(refused("sub/link.png"), HasSubstr("a link that leads out"));
  EXPECT_THAT(refused(""), HasSubstr("an empty path"));
  EXPECT_THAT(refused("."), HasSubstr("the image folder itself"));
  EXPECT_THAT(refused(std::string("a\0b", 3)), HasSubstr("a zero byte"));
  EXPECT_EQ(image_path(folder.path(), "sub/a.png"), fs::canonical(folder.path()) / "sub/a.png");
  EXPECT_EQ(refused("inside/a.png"), "accepted");
  // An absolute path that lies below the folder is as good as its rest.
  EXPECT_EQ(image_path(folder.path(), (folder.path() / "sub/a.png").string()), folder.path() / "sub/a.png");
  EXPECT_THAT(refused((folder.path() / "link/secret.png").string()),
              HasSubstr("an absolute path that lies elsewhere"));
  EXPECT_THAT(refused(folder.path().string()), HasSubstr("the image folder itself"));
}

TEST(Record, LinksMayLeadToTheRootsThatAreNamed) {
  const TemporaryFolder outside, folder;
  outside.write("a.png", "x");
  fs::create_directories(outside.path() / "coco");
  fs::create_symlink(outside.path() / "coco", folder.path() / "coco");
  fs::create_symlink(outside.path() / "a.png", folder.path() / "a.png");
  const auto refused = [&](const std::string& image, std::vector<fs::path> roots) {
    return error_of<DataError>([&] { image_path({folder.path(), std::move(roots)}, image); });
  };
  EXPECT_THAT(refused("coco/1.png", {}), HasSubstr("name the folder that links may lead to in image_roots"));
  EXPECT_EQ(refused("coco/1.png", {outside.path() / "coco"}), "accepted");
  EXPECT_EQ(refused((outside.path() / "coco/1.png").string(), {outside.path() / "coco"}), "accepted");
  EXPECT_THAT(refused("a.png", {outside.path() / "coco"}), HasSubstr("a link that leads out"));
  EXPECT_THAT(refused("a.png", {outside.path() / "co"}),
              HasSubstr("a link that leads out"));  // no folder's beginning
  EXPECT_EQ(refused("a.png", {"/nowhere", outside.path()}), "accepted");
  EXPECT_THAT(refused("coco/../a.png", {outside.path()}), HasSubstr("a path with \"..\""));
}

TEST(Record, DecodingFindsWhatLiesInsideOfAPictureAndIsSilent) {
  const TemporaryFolder folder;
  std::string png = read_file(kGoldenPictures / "rgb.png"), jpeg = read_file(kGoldenPictures / "rgb.jpg");
  folder.write("good.png", png);
  folder.write("good.jpg", jpeg);
  const size_t data = png.find("IDAT") + 8;
  for (size_t i = data + 10; i < data + 20; ++i) png[i] = static_cast<char>(~png[i]);
  folder.write("broken.png", png);
  std::vector<Record> records;
  for (int i = 0; i < 500; ++i)
    records.push_back(fake_record("g", "<image>", "a", {i % 2 == 0 ? "good.png" : "good.jpg"}));
  std::vector<std::pair<int64_t, int64_t>> calls;
  const auto note = [&](int64_t done, int64_t total) { calls.emplace_back(done, total); };
  EXPECT_NO_THROW(decode_images(records, folder.path(), "d.json", note));
  EXPECT_THAT(calls, ElementsAre(std::pair<int64_t, int64_t>(0, 2), std::pair<int64_t, int64_t>(2, 2)));
  records.push_back(fake_record("b", "<image>", "a", {"broken.png"}));
  EXPECT_NO_THROW(check_images(records, folder.path(), "d.json"));
  testing::internal::CaptureStderr();
  const std::string fault = error_of<DataError>([&] { decode_images(records, folder.path(), "d.json"); });
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
  EXPECT_THAT(fault, AllOf(HasSubstr("d.json: 1 images cannot be used:\n  record 500 (id \"b\"): "),
                           HasSubstr("broken.png: the picture's data is broken")));
}

TEST(Record, CheckImagesListsTheFirstTen) {
  const TemporaryFolder folder;
  const std::string png = read_file(fs::path(CALDERA_SOURCE_DIR) / "tests/golden/image/rgb.png");
  folder.write("good.png", png);
  folder.write("cut.png", png.substr(0, png.size() - 6));
  std::vector<Record> records = {fake_record("r0", "<image>", "a", {"good.png"})};
  EXPECT_NO_THROW(check_images(records, folder.path(), "d.json"));
  records.push_back(fake_record("r1", "<image>", "a", {"cut.png"}));
  records.push_back(fake_record("r2", "<image>", "a", {"missing.png"}));
  const std::string two = error_of<DataError>([&] { check_images(records, folder.path(), "d.json"); });
  EXPECT_THAT(two,
              AllOf(HasSubstr("d.json: 2 images cannot be used:"), HasSubstr("record 1 (id \"r1\")"),
                    HasSubstr("truncated"), HasSubstr("record 2 (id \"r2\")"), HasSubstr("missing.png")));
  for (int i = 3; i < 20; ++i)
    records.push_back(fake_record(fmt::format("r{}", i), "<image>", "a", {"missing.png"}));
  const std::string many = error_of<DataError>([&] { check_images(records, folder.path(), "d.json"); });
  EXPECT_THAT(many, AllOf(HasSubstr("19 images"), HasSubstr("the first 10"), HasSubstr("\"r10\"")));
  EXPECT_EQ(many.find("\"r11\""), std::string::npos);
}

}  // namespace caldera
