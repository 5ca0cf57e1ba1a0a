// caldera data check|preview|make-scenes
#include <algorithm>
#include <memory>
#include <set>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "cli/command.h"
#include "data/dataset.h"
#include "data/scenes.h"

namespace caldera {
namespace {

struct DataCommand {
  std::string data, image_folder = ".", out;
  std::vector<std::string> image_roots;
  bool headers_only = false;
  SessionOptions session;
  int64_t max_length = 0;  // 0: not cut
};

// With a model: does --max-length leave each record something to learn?
void check_lengths(const DataCommand& command, const std::vector<Record>& records) {
  if (command.session.model.empty()) {
    CALDERA_CHECK(command.max_length == 0, ConfigError,
                  "--max-length: name the model or tokenizer that counts tokens with --model");
    return;
  }
  TextSession session = open_text(command.session.model, command.session.conversation_template);
  CALDERA_CHECK(command.max_length > 0, ConfigError, "--model: give the recipe's model_max_length as --max-length");
  const bool has_pictures =
      std::any_of(records.begin(), records.end(), [](const Record& record) { return !record.images.empty(); });
  CALDERA_CHECK(session.image_spec || !has_pictures, ConfigError,
                "--max-length: {} names no vision tower, so the tokens of a picture are not known",
                command.session.model.string());
  session.format.model_max_length = command.max_length;
  const auto show = progress_line("lengths");
  const std::vector<size_t> places = cut_to_nothing(
      records, session.format, [&](int64_t done) { show(done, std::ssize(records)); });
  CALDERA_CHECK(places.empty(), DataError, "{}",
                cut_to_nothing_message(records, places, command.data, session.format));
}

void check(const DataCommand& command) {
  const std::vector<Record> records = read_records(command.data);
  const ImageFolder folder{command.image_folder, {command.image_roots.begin(), command.image_roots.end()}};
  if (command.headers_only)
    check_images(records, folder, command.data);
  else
    decode_images(records, folder, command.data, progress_line("pictures"));
  check_lengths(command, records);
  int64_t num_with_picture = 0, num_answers = 0;
  std::set<std::string> pictures;
  for (const Record& record : records) {
    num_with_picture += record.images.empty() ? 0 : 1;
    num_answers += std::count_if(record.turns.begin(), record.turns.end(),
                                 [](const Turn& turn) { return !turn.from_human; });
    pictures.insert(record.images.begin(), record.images.end());
  }
  fmt::print("{}: {} records: {} with pictures ({} files), {} of text alone; {} answers\n", command.data,
             records.size(), num_with_picture, pictures.size(),
             static_cast<int64_t>(records.size()) - num_with_picture, num_answers);
}

// Cut as in training, then written with one placeholder an image again.
TokenizedSample cut(const Record& record, const SampleFormat& format) {
  const Sample sample = make_sample_text(record, format);
  TokenizedSample kept;
  for (size_t i = 0; i < sample.input_ids.size();) {
    kept.input_ids.push_back(sample.input_ids[i]);
    kept.labels.push_back(sample.labels[i]);
    i +=
        sample.input_ids[i] == kImageTokenIndex ? static_cast<size_t>(format.image_spec.num_image_tokens) : 1;
  }
  return kept;
}

void preview(const DataCommand& command) {
  const std::vector<Record> records = read_records(command.data);
  TextSession session = open_text(command.session.model, command.session.conversation_template);
  SampleFormat& format = session.format;
  CALDERA_CHECK(command.max_length == 0 || session.image_spec, ConfigError,
                "--max-length: {} names no vision tower, so the tokens of a picture are not known",
                command.session.model.string());
  format.model_max_length = command.max_length;
  AtomicFile file(command.out);
  for (const Record& record : records) {
    const TokenizedSample sample = command.max_length > 0
                                       ? cut(record, format)
                                       : tokenize(record, *format.conversation, *format.tokenizer);
    const auto num_images = std::count(sample.input_ids.begin(), sample.input_ids.end(), kImageTokenIndex);
    file.write(json_line({{"id", record.id},
                          {"input_ids", sample.input_ids},
                          {"labels", sample.labels},
                          {"num_image_tokens",
                           session.image_spec ? num_images * session.image_spec->num_image_tokens : 0}}) +
               "\n");
  }
  file.commit();
}

void setup_check(CLI::App& command) {
  auto options = std::make_shared<DataCommand>();
  command.add_option("--data", options->data, "LLaVA's JSON or JSONL")->required();
  command.add_option("--images", options->image_folder, "the folder of its pictures")->capture_default_str();
  command.add_option("--image-roots", options->image_roots, "folders that links among them may lead to");
  command.add_flag("--headers-only", options->headers_only,
                   "look at the pictures' sizes and ends alone, instead of decoding them");
  command.add_option("--model", options->session.model,
                     "a model or tokenizer folder: also find records that --max-length cuts to nothing");
  command.add_option("--template", options->session.conversation_template,
                     "conversation template (default: the model's own, else its tokenizer's)");
  command.add_option("--max-length", options->max_length, "model_max_length of the recipe")
      ->check(CLI::Range(1, 100000000));
  command.callback([options] { check(*options); });
}

void setup_preview(CLI::App& command) {
  auto options = std::make_shared<DataCommand>();
  command.add_option("--data", options->data, "LLaVA's JSON or JSONL")->required();
  command.add_option("--images", options->image_folder, "the folder of its pictures (they are not read)");
  command
      .add_option("--model", options->session.model, "a model or tokenizer folder; its weights are not read")
      ->required();
  command.add_option("--template", options->session.conversation_template,
                     "conversation template (default: the model's own, else its tokenizer's)");
  command
      .add_option("--max-length", options->max_length,
                  "cut as in training, images counted in full (default: not cut)")
      ->check(CLI::Range(1, 100000000));
  command
      .add_option("--out", options->out,
                  "JSONL to write: {\"id\", \"input_ids\", \"labels\", \"num_image_tokens\"} a line")
      ->required();
  command.callback([options] { preview(*options); });
}

void setup_make_scenes(CLI::App& command) {
  struct MakeScenes {
    std::string out;
    ScenesOptions scenes;
  };
  auto options = std::make_shared<MakeScenes>();
  ScenesOptions& scenes = options->scenes;
  command.add_option("--out", options->out, "folder to write")->required();
  command.add_option("--num-train", scenes.num_train, "pictures to train on")
      ->check(CLI::Range(1, 10000000))
      ->capture_default_str();
  command.add_option("--num-test", scenes.num_test, "held-out pictures")
      ->check(CLI::Range(1, 10000000))
      ->capture_default_str();
  command.add_option("--image-size", scenes.image_size_px, "edge in pixels")
      ->check(CLI::Range(32, 4096))
      ->capture_default_str();
  command.add_option("--seed", scenes.seed, "another seed, other pictures")->capture_default_str();
  command.callback([options] {
    check_out_folder(options->out, fs::exists(fs::path(options->out) / "finetune.json"));
    make_scenes(options->out, options->scenes);
  });
}

}  // namespace

void setup_data(CLI::App& command) {
  command.require_subcommand(1);
  setup_check(*command.add_subcommand("check", "read a data file and look at each of its pictures"));
  setup_preview(*command.add_subcommand("preview", "the tokens and labels of each sample"));
  setup_make_scenes(
      *command.add_subcommand("make-scenes", "generate pictures of shapes with captions and questions"));
}

}  // namespace caldera
