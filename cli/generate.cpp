// caldera generate --model DIR --prompt TEXT [--image FILE]...
// caldera generate --model DIR --data FILE.json --images DIR --out FILE.jsonl
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/strings.h"
#include "cli/command.h"
#include "data/image.h"
#include "eval/answer.h"

namespace caldera {
namespace {

struct GenerateCommand {
  SessionOptions session;
  std::string prompt, data, image_folder = ".", out;
  std::vector<std::string> images;
  AnswerOptions answer;
};

int64_t count_placeholders(const std::string& text) {
  return static_cast<int64_t>(split(text, kImagePlaceholder).size()) - 1;
}

void generate_one(const GenerateCommand& command) {
  std::string prompt = command.prompt;
  const auto num_images = static_cast<int64_t>(command.images.size());
  if (count_placeholders(prompt) == 0)
    for (int64_t i = 0; i < num_images; ++i) prompt = fmt::format("{}\n{}", kImagePlaceholder, prompt);
  CALDERA_CHECK(count_placeholders(prompt) == num_images, ConfigError,
                "--prompt holds {} {} and {} --image are given: give as many", count_placeholders(prompt),
                kImagePlaceholder, num_images);
  std::vector<Image> images;  // before the model: a picture that cannot be read shows at once
  for (const std::string& file : command.images) images.push_back(load_image(file));

  ModelSession session = open_model(command.session);
  std::vector<at::Tensor> pixels;
  for (const Image& image : images)
    pixels.push_back(preprocess_image(image, session.format.image_spec, session.format.image_aspect_ratio));
  const std::string text =
      answer(*session.model, {{.from_human = true, .value = prompt}}, pixels, session.format, command.answer);
  fmt::print("{}\n", text);
}

void generate_many(const GenerateCommand& command) {
  const std::vector<Record> records = read_records(command.data, Answers::kMayLack);
  check_images(records, command.image_folder, command.data);
  AtomicFile file(command.out);
  ModelSession session = open_model(command.session);
  const std::vector<std::string> answers =
      answer_records(*session.model, records, command.image_folder, session.format, command.answer,
                     progress_line("answers"));
  for (size_t i = 0; i < records.size(); ++i)
    file.write(json_line({{"id", records[i].id}, {"text", answers[i]}}) + "\n");
  file.commit();
}

}  // namespace

void setup_generate(CLI::App& command) {
  auto options = std::make_shared<GenerateCommand>();
  add_session_options(command, options->session);
  CLI::Option* prompt =
      command.add_option("--prompt", options->prompt, "the question; pictures go where it says <image>");
  command.add_option("--image", options->images, "a picture file; may be repeated")
      ->needs(prompt)
      ->allow_extra_args(false);
  CLI::Option* data =
      command.add_option("--data", options->data, "LLaVA's JSON or JSONL: the last question of each record");
  data->excludes(prompt);
  command.add_option("--images", options->image_folder, "the folder of --data's pictures")->needs(data);
  CLI::Option* out = command.add_option("--out", options->out, "JSONL to write: {\"id\", \"text\"} a line");
  data->needs(out);
  out->needs(data);
  command.add_option("--max-new-tokens", options->answer.max_new_tokens, "longest answer")
      ->check(CLI::Range(1, 1000000))
      ->capture_default_str();
  command.add_option("--temperature", options->answer.temperature, "0: always the likeliest token")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command
      .add_option("--top-p", options->answer.top_p, "draw among the likeliest tokens that make up this share")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command.add_option("--seed", options->answer.seed, "of the draws")->capture_default_str();
  command.callback([options, prompt, data] {
    CALDERA_CHECK(*prompt || *data, ConfigError,
                  "generate: give --prompt TEXT, or --data FILE and --out FILE");
    if (*data)
      generate_many(*options);
    else
      generate_one(*options);
  });
}

}  // namespace caldera
