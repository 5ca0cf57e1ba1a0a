#include "data/scenes.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/words.h"
#include "data/scene.h"

namespace caldera {
namespace {

// Streams of random numbers: each picture and each file draws from its own, so none depends on how many
// others there are.
enum Stream : uint64_t { kScene = 1, kPretrain, kFinetune, kTest, kCaptionTest, kBoxes, kInventory };

// LLaVA's instructions for brief descriptions (Table 11 of the paper), a selection.
const std::vector<std::string> kBriefRequests = {
    "Describe the image concisely.", "Provide a brief description of the given image.",
    "Share a concise interpretation of the image provided.", "Summarize the visual content of the image.",
    "Give a short and clear explanation of the subsequent image."};
struct Picture {
  std::string id, file;
  Scene scene;
  bool is_test = false, is_held_out = false;
  uint64_t index = 0;
};

Json turn(const char* from, const std::string& value) { return Json{{"from", from}, {"value", value}}; }
std::string with_image(const std::string& text) { return std::string(kImagePlaceholder) + "\n" + text; }

Json record(const std::string& id, const Picture& picture, Json conversations) {
  Json json;
  json["id"] = id;
  json["image"] = picture.file;
  json["conversations"] = std::move(conversations);
  return json;
}

// A list with one record a line: easy to look into, and never held in memory whole.
class RecordFile {
 public:
  explicit RecordFile(const fs::path& path) : file_(path) {}
  void add(const Json& json) {
    file_.write(num_records_++ == 0 ? "[\n" : ",\n");
    file_.write(json_line(json));
  }
  void commit() {
    file_.write(num_records_ == 0 ? "[]\n" : "\n]\n");
    file_.commit();
  }

 private:
  AtomicFile file_;
  int64_t num_records_ = 0;
};

Picture make_picture(const ScenesOptions& options, uint64_t index, bool is_test) {
  Picture picture;
  picture.index = index;
  picture.is_test = is_test;
  picture.is_held_out = is_test && index % 2 == 1;
  picture.id = fmt::format("{}-{:06}", is_test ? "test" : "train", index);
  picture.file = picture.id + ".png";
  Rng rng(options.seed, Stream::kScene, is_test, index);
  picture.scene = sample_scene(rng, picture.is_held_out);
  return picture;
}

void write_picture(const fs::path& folder, const Picture& picture, int size_px) {
  cv::Mat bgr;
  cv::cvtColor(draw_scene(picture.scene, size_px), bgr, cv::COLOR_RGB2BGR);
  std::vector<uint8_t> png;
  CALDERA_ASSERT(cv::imencode(".png", bgr, png));
  // No flush here: write_folder_atomic flushes every file before the folder is seen.
  std::ofstream file(folder / picture.file, std::ios::binary);
  file.write(reinterpret_cast<const char*>(png.data()), static_cast<std::streamsize>(png.size()));
  CALDERA_CHECK(file.flush(), Error, "{}: cannot write", (folder / picture.file).string());
}

// `count` different questions, types in turn from a random one on, then shuffled: no turn is bound to a type.
std::vector<Question> ask_many(const Scene& scene, size_t count, Rng& rng) {
  std::vector<Question> questions;
  for (uint64_t type = rng.below(kQuestionTypes.size()); questions.size() < count; ++type) {
    const Question question = ask(scene, kQuestionTypes[type % kQuestionTypes.size()], rng);
    const bool is_new = std::none_of(questions.begin(), questions.end(),
                                     [&](const Question& other) { return other.text == question.text; });
    if (is_new) questions.push_back(question);
  }
  rng.shuffle(questions);
  return questions;
}

Json caption_record(const Picture& picture, Rng rng) {
  const std::string request = rng.pick(kBriefRequests);
  return record(picture.id, picture,
                {turn("human", with_image(request)), turn("gpt", short_caption(picture.scene, rng))});
}

Json questions_record(const Picture& picture, Rng rng) {
  Json turns = Json::array();
  for (const Question& question : ask_many(picture.scene, static_cast<size_t>(rng.between(8, 12)), rng)) {
    turns.push_back(turn("human", turns.empty() ? with_image(question.text) : question.text));
    turns.push_back(turn("gpt", question.answer));
  }
  return record(picture.id, picture, std::move(turns));
}

Json inventory_record(const Picture& picture, const std::string& text) {
  return record(picture.id + "-inventory", picture,
                {turn("human", with_image("Make an inventory of the image.")), turn("gpt", text)});
}

// LLaVA's caps_boxes form: five captions and, of each object, what it is and where (x1, y1, x2, y2 from 0 to
// 1).
Json boxes_record(const Picture& picture, Rng rng) {
  Json json{{"id", picture.id}, {"image", picture.file}, {"split", picture.is_test ? "test" : "train"}};
  json["captions"] = Json::array();
  for (int i = 0; i < 5; ++i) {
    json["captions"].push_back(i < 2 ? short_caption(picture.scene, rng) : long_caption(picture.scene, rng));
  }
  json["instances"] = Json::array();
  for (const SceneObject& object : picture.scene.objects) {
    Json box = Json::array();
    for (const double edge : object.box()) box.push_back(std::round(edge * 1000) / 1000);
    json["instances"].push_back(
        {{"category", fmt::format("{} {}", kColours[static_cast<size_t>(object.colour)],
                                  kShapes[static_cast<size_t>(object.shape)])},
         {"bbox", box}});
  }
  return json;
}

// Two questions a picture, of types in turn: evenly many of each, and as many "yes" as "no".
void add_test_questions(RecordFile& file, const Picture& picture, uint64_t seed) {
  Rng rng(seed, Stream::kTest, picture.index);
  for (uint64_t i = 0; i < 2; ++i) {
    const std::string type = kQuestionTypes[(2 * picture.index + i) % kQuestionTypes.size()];
    Question question = ask(picture.scene, type, rng);
    while (type == "yes_no" && question.answer != (i == 0 ? "yes" : "no"))
      question = ask(picture.scene, type, rng);
    Json json = record(fmt::format("{}-{}", picture.id, i), picture,
                       {turn("human", with_image(question.text)), turn("gpt", question.answer)});
    json["type"] = type;
    json["held_out"] = picture.is_held_out;
    file.add(json);
  }
}

void fill(const fs::path& folder, const ScenesOptions& options) {
  const uint64_t seed = options.seed;
  const auto size_px = static_cast<int>(options.image_size_px);
  fs::create_directory(folder / "images");
  RecordFile pretrain(folder / "pretrain.json"), finetune(folder / "finetune.json"),
      base_captions(folder / "base_captions.json"), base_places(folder / "base_places.json");
  RecordFile test(folder / "test.json"), captions_test(folder / "captions_test.json"),
      boxes(folder / "boxes.json");
  for (uint64_t i = 0; i < static_cast<uint64_t>(options.num_train); ++i) {
    const Picture picture = make_picture(options, i, /*is_test=*/false);
    write_picture(folder / "images", picture, size_px);
    const Json caption = caption_record(picture, Rng(seed, Stream::kPretrain, i));
    pretrain.add(caption);
    base_captions.add(caption);
    Rng rng(seed, Stream::kInventory, i);
    base_captions.add(inventory_record(picture, inventory(picture.scene, rng)));
    if (picture.scene.objects.size() > 1)
      base_places.add(inventory_record(picture, place_list(picture.scene, rng)));
    finetune.add(questions_record(picture, Rng(seed, Stream::kFinetune, i)));
    boxes.add(boxes_record(picture, Rng(seed, Stream::kBoxes, 0, i)));
  }
  for (uint64_t i = 0; i < static_cast<uint64_t>(options.num_test); ++i) {
    const Picture picture = make_picture(options, i, /*is_test=*/true);
    write_picture(folder / "images", picture, size_px);
    add_test_questions(test, picture, seed);
    captions_test.add(caption_record(picture, Rng(seed, Stream::kCaptionTest, i)));
    boxes.add(boxes_record(picture, Rng(seed, Stream::kBoxes, 1, i)));
  }
  for (RecordFile* file : {&pretrain, &finetune, &base_captions, &base_places, &test, &captions_test, &boxes})
    file->commit();
}

}  // namespace

void make_scenes(const std::filesystem::path& folder, const ScenesOptions& options) {
  CALDERA_CHECK(options.num_train > 0 && options.num_test > 0, ConfigError,
                "scenes: expected at least one picture to train on and one to test on, got {} and {}",
                options.num_train, options.num_test);
  CALDERA_CHECK(options.image_size_px >= 32 && options.image_size_px <= 4096, ConfigError,
                "scenes: image_size_px: expected 32 to 4096, got {}", options.image_size_px);
  // The folder is replaced whole, so it must be ours.
  CALDERA_CHECK(!fs::exists(folder) || fs::is_empty(folder) || fs::exists(folder / "boxes.json"), ConfigError,
                "{}: the folder holds something else than scenes; choose another, it would be replaced",
                folder.string());
  write_folder_atomic(folder, [&](const fs::path& temporary) { fill(temporary, options); });
}

}  // namespace caldera
