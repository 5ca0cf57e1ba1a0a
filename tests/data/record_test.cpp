#include "data/record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/data/fake_text.h"

namespace caldera {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<Record> read(const std::string& json, const std::string& name = "data.json") {
  const TemporaryFolder folder;
  return read_records(folder.write(name, json));
}
std::string error(const std::string& json, const std::string& name = "data.json") {
  return error_of<DataError>([&] { read(json, name); });
}

const std::string kTurns = R"([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}])";
std::string with_turns(const std::string& turns) {
  return R"([{"id": "x7", "conversations": )" + turns + "}]";
}

}  // namespace

TEST(Record, ReadsWhatLlavaReads) {
  const std::vector<Record> records = read(R"([
    {"id": "000", "image": "coco/a.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                           {"from": "gpt", "value": "A \"c\u00e4t\"."}]},
    {"id": 17, "model": "", "conversations": )" +
                                           kTurns + R"(},
    {"image": null, "type": "count", "conversations": )" +
                                           kTurns + R"(},
    {"id": "many", "image": ["a.jpg", "b.jpg"], "conversations": [{"from": "human", "value": "<image> or <image>?"}]}
  ])");
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
  const std::string same = R"({"id": "a", "conversations": )" + kTurns;
  const auto records =
      read("[" + same + R"(, "held_out": true}, )" + same + R"(, "held_out": false}, )" + same + "}]");
  EXPECT_EQ(records[0].held_out, true);
  EXPECT_EQ(records[1].held_out, false);
  EXPECT_EQ(records[2].held_out, std::nullopt);
}

TEST(Record, JsonLinesAreTheSame) {
  const std::string line = R"({"id": "a", "conversations": )" + kTurns + "}";
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

TEST(Record, BrokenDocumentsNameThePlace) {
  EXPECT_THAT(error(""), HasSubstr("the file is empty"));
  EXPECT_THAT(error("{}"), HasSubstr("expected a list of records"));
  EXPECT_THAT(error("[]"), HasSubstr("no records"));
  EXPECT_THAT(error("[{\"id\": \"a\""), HasSubstr("cut off in record 0"));
  EXPECT_THAT(error("[" + with_turns(kTurns).substr(1, with_turns(kTurns).size() - 2)),
              HasSubstr("cut off in record 0"));
  EXPECT_THAT(error(with_turns(kTurns) + "x"), HasSubstr("text after the list's end"));
  const std::string record = with_turns(kTurns).substr(1, with_turns(kTurns).size() - 2);
  EXPECT_THAT(error("[" + record + ",]"), HasSubstr("record 1"));
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
  expect(with_turns(R"([{"from": "system", "value": "a"}])"),
         "expected \"human\" or \"gpt\", got \"system\"");
  expect(with_turns(R"([{"from": "human", "value": "a"}, {"from": "human", "value": "a"}])"),
         "turn 1: expected \"gpt\", got \"human\"");
  expect(with_turns(R"([{"from": "human", "value": "a"}, {"from": "gpt", "value": " \n"}])"),
         "turn 1: an empty answer");
  expect(with_turns(R"([{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}])"),
         "<image> in an answer");
  expect(with_turns(R"([{"from": "human", "value": "<image>"}])"),
         "expected one <image> for each of its 0 images, got 1");
  expect(R"([{"id": "x7", "image": "a.jpg", "conversations": )" + kTurns + "}]",
         "expected one <image> for each of its 1 images, got 0");
  expect(R"([{"id": "x7", "image": {}, "conversations": )" + kTurns + "}]",
         "\"image\": expected a path or a list of paths");
  expect(R"([{"id": "x7", "image": [1], "conversations": )" + kTurns + "}]",
         "an entry of \"image\": expected a string");
  expect(R"([{"id": "x7", "image": "", "conversations": )" + kTurns + "}]", "an empty path");
  expect(R"([{"id": "x7", "type": 1, "conversations": )" + kTurns + "}]", "\"type\": expected a string");
  expect(R"([{"id": "x7", "held_out": "yes", "conversations": )" + kTurns + "}]",
         "\"held_out\": expected true or false, got a string");
  EXPECT_THAT(error(R"([{"id": [], "conversations": )" + kTurns + "}]"),
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
  EXPECT_THAT(refused("/etc/passwd"), HasSubstr("an absolute path"));
  EXPECT_THAT(refused("link/secret.png"), HasSubstr("a link that leads out"));
  EXPECT_THAT(refused("sub/link.png"), HasSubstr("a link that leads out"));
  EXPECT_THAT(refused(""), HasSubstr("an empty path"));
  EXPECT_THAT(refused("."), HasSubstr("the image folder itself"));
  EXPECT_THAT(refused(std::string("a\0b", 3)), HasSubstr("a zero byte"));
  EXPECT_EQ(image_path(folder.path(), "sub/a.png"), fs::canonical(folder.path()) / "sub/a.png");
  EXPECT_EQ(refused("inside/a.png"), "accepted");
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
