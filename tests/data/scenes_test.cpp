// The generated data is checked by other means than it was made: questions are taken apart as text, and
// answered from boxes.json alone.
#include "data/scenes.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <regex>
#include <set>

#include "base/json.h"
#include "base/strings.h"
#include "data/image.h"
#include "tests/data/fake_text.h"

namespace caldera {
namespace {

using ::testing::HasSubstr;

const std::vector<std::string> kHeldOut = {"purple circle", "blue square", "green triangle", "red star",
                                           "orange cross"};

struct Shape {
  std::string colour, shape, place;
};
using Shapes = std::vector<Shape>;

Shapes shapes_of(const Json& boxes) {
  Shapes shapes;
  for (const Json& instance : boxes["instances"]) {
    const std::string category = instance["category"];
    const auto& box = instance["bbox"];
    const double x = (box[0].get<double>() + box[2].get<double>()) / 2,
                 y = (box[1].get<double>() + box[3].get<double>()) / 2;
    const size_t space = category.find(' ');
    shapes.push_back({category.substr(0, space), category.substr(space + 1),
                      std::string(y < 0.5 ? "top " : "bottom ") + (x < 0.5 ? "left" : "right")});
  }
  return shapes;
}

// The shapes that a description means: "shape", "red shape", "circle", "red circle".
Shapes matching(const Shapes& shapes, const std::string& words) {
  const size_t space = words.find(' ');
  const std::string colour = space == std::string::npos ? "" : words.substr(0, space);
  const std::string shape = space == std::string::npos ? words : words.substr(space + 1);
  Shapes found;
  std::copy_if(shapes.begin(), shapes.end(), std::back_inserter(found), [&](const Shape& s) {
    return (colour.empty() || s.colour == colour) && (shape == "shape" || s.shape == shape);
  });
  return found;
}

// The one right answer; "" where there is none, or more than one.
std::string answer_of(const Shapes& shapes, const std::string& question) {
  std::smatch match;
  const auto only = [&](const Shapes& found, std::string Shape::*what) {
    return found.size() == 1 ? found[0].*what : "";
  };
  const auto at = [&](const std::string& place) {
    Shapes found;
    std::copy_if(shapes.begin(), shapes.end(), std::back_inserter(found),
                 [&](const Shape& s) { return s.place == place; });
    return found;
  };
  const auto asks = [&](const char* pattern) {
    return std::regex_match(question, match, std::regex(pattern));
  };
  if (asks("What colour is the shape in the (\\w+ \\w+)\\?")) return only(at(match[1]), &Shape::colour);
  if (asks("What colour is the (\\w+)\\?")) return only(matching(shapes, match[1]), &Shape::colour);
  if (asks("What shape is in the (\\w+ \\w+)\\?")) return only(at(match[1]), &Shape::shape);
  if (asks("Which shape is (\\w+)\\?"))
    return only(matching(shapes, match[1].str() + " shape"), &Shape::shape);
  if (asks("Where is the (.+)\\?")) return only(matching(shapes, match[1]), &Shape::place);
  if (asks("How many shapes are there\\?")) return std::to_string(shapes.size());
  if (asks("How many (\\w+) shapes are there\\?"))
    return std::to_string(matching(shapes, match[1].str() + " shape").size());
  if (asks("How many crosses are there\\?")) return std::to_string(matching(shapes, "cross").size());
  if (asks("How many (\\w+)s are there\\?")) return std::to_string(matching(shapes, match[1]).size());
  if (asks("Is there an? (.+)\\?")) return matching(shapes, match[1]).empty() ? "no" : "yes";
  return "";
}

class Scenes : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new TemporaryFolder;
    make_scenes(folder_->path() / "scenes", {.num_train = 300, .num_test = 100, .seed = 5});
    for (const Json& boxes : read("boxes.json")) shapes_[boxes["image"]] = shapes_of(boxes);
  }
  static void TearDownTestSuite() { delete folder_; }
  static fs::path path(const std::string& name) { return folder_->path() / "scenes" / name; }
  static Json read(const std::string& name) { return read_json(path(name)); }

  static inline TemporaryFolder* folder_ = nullptr;
  static inline std::map<std::string, Shapes> shapes_;  // by image
};

}  // namespace

TEST_F(Scenes, FilesAreRecordsOfTheirPictures) {
  const std::map<std::string, size_t> sizes = {{"pretrain.json", 300},
                                               {"finetune.json", 300},
                                               {"base_captions.json", 600},
                                               {"test.json", 200},
                                               {"captions_test.json", 100}};
  for (const auto& [name, size] : sizes) {
    const std::vector<Record> records = read_records(path(name));
    EXPECT_EQ(records.size(), size) << name;
    EXPECT_NO_THROW(check_images(records, path("images"), name));
    std::set<std::string> ids;
    for (const Record& record : records) ids.insert(record.id);
    EXPECT_EQ(ids.size(), size) << name;
  }
  const Image image = load_image(path("images/train-000000.png"));
  EXPECT_EQ(image.height, 64);
  EXPECT_EQ(image.width, 64);
  for (const Record& record : read_records(path("finetune.json"))) {
    EXPECT_GE(record.turns.size(), 16u);
    EXPECT_LE(record.turns.size(), 24u);
  }
}

TEST_F(Scenes, TheSameSeedGivesTheSameBytes) {
  const auto files = [](const fs::path& folder) {
    std::map<std::string, std::string> contents;
    for (const auto& entry : fs::recursive_directory_iterator(folder)) {
      if (entry.is_regular_file()) contents[fs::relative(entry.path(), folder)] = read_file(entry.path());
    }
    return contents;
  };
  const TemporaryFolder other;
  make_scenes(other.path() / "a", {.num_train = 20, .num_test = 10, .seed = 5});
  make_scenes(other.path() / "b", {.num_train = 20, .num_test = 10, .seed = 5});
  make_scenes(other.path() / "c", {.num_train = 20, .num_test = 10, .seed = 6});
  EXPECT_EQ(files(other.path() / "a").size(), 37u);
  EXPECT_TRUE(files(other.path() / "a") == files(other.path() / "b"));
  EXPECT_FALSE(files(other.path() / "a") == files(other.path() / "c"));
  // A picture depends on the seed and its number alone.
  EXPECT_EQ(read_file(other.path() / "a/images/train-000007.png"),
            read_file(path("images/train-000007.png")));
}

TEST_F(Scenes, HeldOutCombinationsNeverMeetInTraining) {
  for (const auto& [image, shapes] : shapes_) {
    const bool shows = std::any_of(shapes.begin(), shapes.end(), [](const Shape& s) {
      return std::find(kHeldOut.begin(), kHeldOut.end(), s.colour + " " + s.shape) != kHeldOut.end();
    });
    EXPECT_FALSE(shows && image.starts_with("train")) << image;
  }
  for (const char* name : {"pretrain.json", "finetune.json", "base_captions.json", "base_places.json"}) {
    const std::string text = read_file(path(name));
    for (const std::string& pair : kHeldOut)
      EXPECT_EQ(text.find(pair), std::string::npos) << name << ": " << pair;
  }
  int64_t num_held_out = 0;
  for (const Json& record : read("test.json")) {
    const Shapes& shapes = shapes_.at(record["image"]);
    const bool shows = std::any_of(shapes.begin(), shapes.end(), [](const Shape& s) {
      return std::find(kHeldOut.begin(), kHeldOut.end(), s.colour + " " + s.shape) != kHeldOut.end();
    });
    EXPECT_EQ(record["held_out"].get<bool>(), shows) << record["id"];
    num_held_out += shows;
  }
  EXPECT_EQ(num_held_out, 100);
}

TEST_F(Scenes, EveryAnswerFollowsFromTheBoxes) {
  int64_t num_questions = 0;
  for (const char* name : {"finetune.json", "test.json"}) {
    for (const Record& record : read_records(path(name))) {
      std::set<std::string> asked;
      for (size_t i = 0; i < record.turns.size(); i += 2) {
        std::string question = record.turns[i].value;
        if (i == 0) {
          ASSERT_TRUE(question.starts_with("<image>\n"));
          question = question.substr(8);
        }
        EXPECT_TRUE(asked.insert(question).second) << "asked twice: " << question;
        EXPECT_EQ(answer_of(shapes_.at(record.images[0]), question), record.turns[i + 1].value)
            << record.id << ": " << question;
        ++num_questions;
      }
    }
  }
  EXPECT_GT(num_questions, 1500);
}

TEST_F(Scenes, CaptionsNameEveryShapeInItsPlace) {
  static const std::regex named(
      "(red|orange|yellow|green|blue|purple|pink) (circle|square|triangle|star|cross)");
  const auto check = [](const std::string& caption, const Shapes& shapes) {
    const std::sregex_iterator begin(caption.begin(), caption.end(), named), end;
    EXPECT_EQ(static_cast<size_t>(std::distance(begin, end)), shapes.size()) << caption;
    for (const Shape& shape : shapes) {
      const std::string what = shape.colour + " " + shape.shape;
      const std::regex either("[^.,]*(" + what + "( is)? in the " + shape.place + "|[Ii]n the " +
                              shape.place + "( there)?( is)? an? " + what + "|" + shape.place + " is an? " +
                              what + ").*");
      EXPECT_TRUE(std::regex_search(caption, either)) << caption << " / " << what << " " << shape.place;
    }
  };
  for (const char* name : {"pretrain.json", "captions_test.json"}) {
    for (const Record& record : read_records(path(name)))
      check(record.turns[1].value, shapes_.at(record.images[0]));
  }
  for (const Json& boxes : read("boxes.json")) {
    for (const std::string caption : boxes["captions"]) check(caption, shapes_.at(boxes["image"]));
  }
}

static int64_t count_kind(const Shapes& shapes, const std::string& kind) {
  return std::count_if(shapes.begin(), shapes.end(), [&](const Shape& shape) {
    return kind == shape.colour || kind == shape.shape || kind == shape.colour + " " + shape.shape;
  });
}

TEST_F(Scenes, RemarksOfCaptionsCountRight) {
  const std::map<std::string, int64_t> numbers = {
      {"no", 0}, {"one", 1}, {"two", 2}, {"three", 3}, {"four", 4}};
  const std::regex remark(
      "There (is|are) (no|one|two|three|four) ((\\w+) "
      "shapes?|(circle|square|triangle|star|cross)(s|es)?)\\.");
  int64_t num_remarks = 0;
  for (const Json& boxes : read("boxes.json")) {
    for (const std::string caption : boxes["captions"]) {
      for (std::sregex_iterator it(caption.begin(), caption.end(), remark), end; it != end; ++it) {
        const std::string kind = (*it)[4].matched ? (*it)[4] : (*it)[5];
        EXPECT_EQ(count_kind(shapes_.at(boxes["image"]), kind), numbers.at((*it)[2]))
            << caption << ": " << kind;
        ++num_remarks;
      }
    }
  }
  EXPECT_GT(num_remarks, 1000);
}

TEST_F(Scenes, InventoriesAreTrue) {
  std::map<std::string, int64_t> num_facts;  // by section
  std::vector<Record> records = read_records(path("base_captions.json"));
  const std::vector<Record> on_places = read_records(path("base_places.json"));
  records.insert(records.end(), on_places.begin(), on_places.end());
  for (const Record& record : records) {
    if (!record.id.ends_with("-inventory")) continue;
    const Shapes& shapes = shapes_.at(record.images[0]);
    const auto is_so = [&](const std::function<bool(const Shape&)>& holds) {
      return std::any_of(shapes.begin(), shapes.end(), holds);
    };
    for (const std::string& part : split(record.turns[1].value, ".")) {
      const size_t colon = part.find(": ");
      if (colon == std::string::npos) continue;
      const std::string heading(strip(part.substr(0, colon)));
      for (const std::string& fact : split(part.substr(colon + 2), ",")) {
        const size_t middle = fact.find(": ");
        ASSERT_NE(middle, std::string::npos) << fact;
        const std::string of(strip(fact.substr(0, middle))), is(strip(fact.substr(middle + 2)));
        ++num_facts[heading];
        const auto is_of = [&](const Shape& s) {
          return of == s.colour || of == s.shape || of == s.colour + " " + s.shape;
        };
        const int64_t number = count_kind(shapes, of);
        const bool is_right =
            heading == "Places"
                ? number == 1 && is_so([&](const Shape& s) { return is_of(s) && s.place == is; })
            : heading == "Things"
                ? is_so([&](const Shape& s) { return s.place == of; })
                      ? is_so([&](const Shape& s) { return s.place == of && s.colour + " " + s.shape == is; })
                      : is == "empty"
            : heading == "Colours"
                ? number == 1 && is_so([&](const Shape& s) { return s.shape == of && s.colour == is; })
            : heading == "Shapes"
                ? number == 1 && is_so([&](const Shape& s) { return s.colour == of && s.shape == is; })
            : heading == "Numbers" ? is == std::to_string(number)
                                   : heading == "Present" && is == (number > 0 ? "yes" : "no");
        EXPECT_TRUE(is_right) << record.id << ": " << part << ": " << fact;
      }
    }
  }
  for (const char* heading : {"Places", "Things", "Colours", "Shapes", "Numbers", "Present"})
    EXPECT_GT(num_facts[heading], 100);
}

TEST_F(Scenes, BlindGuessingIsPoor) {
  std::map<std::string, std::map<std::string, double>> answers;  // by type
  for (const Record& record : read_records(path("test.json"))) ++answers[record.type][record.turns[1].value];
  EXPECT_EQ(answers.size(), 5u);
  for (const auto& [type, counts] : answers) {
    double total = 0, most = 0;
    for (const auto& [answer, count] : counts) {
      total += count;
      most = std::max(most, count);
    }
    EXPECT_EQ(total, 40) << type;
    EXPECT_LT(most / total, 0.6) << type;
  }
}

TEST_F(Scenes, ShapesHaveTheirColoursInTheirBoxes) {
  const std::map<std::string, std::array<double, 3>> rgb = {
      {"red", {215, 40, 40}},   {"orange", {245, 140, 30}}, {"yellow", {245, 225, 55}},
      {"green", {45, 170, 65}}, {"blue", {45, 85, 220}},    {"purple", {140, 55, 190}},
      {"pink", {250, 150, 200}}};
  for (const Json& boxes : read("boxes.json")) {
    const Image image = load_image(path("images") / boxes["image"].get<std::string>());
    for (const Json& instance : boxes["instances"]) {
      const auto& box = instance["bbox"];
      EXPECT_GE((box[2].get<double>() - box[0].get<double>()) * 64, 13) << boxes["id"];
      const auto middle = [&](int i) {
        return static_cast<int64_t>((box[i].get<double>() + box[i + 2].get<double>()) * 32);
      };
      const uint8_t* pixel = &image.pixels[static_cast<size_t>((middle(1) * 64 + middle(0)) * 3)];
      std::string nearest;
      double least = 1e9;
      for (const auto& [colour, value] : rgb) {
        double distance = 0;
        for (size_t c = 0; c < 3; ++c) distance += std::abs(value[c] - pixel[c]);
        if (distance < least) nearest = colour, least = distance;
      }
      const std::string category = instance["category"];
      EXPECT_EQ(category.substr(0, category.find(' ')), nearest) << boxes["id"];
    }
  }
}

TEST_F(Scenes, RefusesWhatItCannotDo) {
  const TemporaryFolder other;
  const auto message = [&](const ScenesOptions& options) {
    return error_of<ConfigError>([&] { make_scenes(other.path() / "scenes", options); });
  };
  EXPECT_THAT(message({.num_train = 0}), HasSubstr("at least one picture"));
  EXPECT_THAT(message({.image_size_px = 8}), HasSubstr("image_size_px: expected 32 to 4096, got 8"));
  other.write("thesis.txt", "years of work");
  EXPECT_THAT(error_of<ConfigError>([&] { make_scenes(other.path(), {.num_train = 1, .num_test = 1}); }),
              HasSubstr("the folder holds something else"));
  EXPECT_TRUE(fs::exists(other.path() / "thesis.txt"));
}

}  // namespace caldera
