// caldera score --model DIR --data FILE.json --images DIR --out FILE.jsonl [--taps FILE.safetensors]
#include "eval/score.h"

#include <memory>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "cli/command.h"
#include "eval/taps.h"

namespace caldera {
namespace {

struct ScoreCommand {
  SessionOptions session;
  std::string data, image_folder = ".", out, taps;
  int64_t max_tokens = 8192, taps_samples = 1;
};

// The first samples in one row, and what every layer makes of them.
void write_taps(const ScoreCommand& command, const std::vector<Record>& records, ModelSession& session) {
  std::vector<Sample> samples;
  for (size_t i = 0; i < std::min(records.size(), static_cast<size_t>(command.taps_samples)); ++i)
    samples.push_back(make_sample(records[i], command.image_folder, session.format));
  write_safetensors(command.taps, record_taps(*session.model, pack(samples)));
}

void score(const ScoreCommand& command) {
  const std::vector<Record> records = read_records(command.data);
  check_images(records, command.image_folder, command.data);
  AtomicFile file(command.out);
  ModelSession session = open_model(command.session);
  if (!command.taps.empty()) write_taps(command, records, session);
  for (const Score& line : score_records(*session.model, records, command.image_folder, session.format,
                                         command.max_tokens, progress_line("scores")))
    file.write(json_line({{"id", line.id},
                          {"num_tokens", line.num_tokens},
                          {"num_supervised", line.num_supervised},
                          {"nll_sum", line.nll_sum}}) +
               "\n");
  file.commit();
}

}  // namespace

void setup_score(CLI::App& command) {
  auto options = std::make_shared<ScoreCommand>();
  add_session_options(command, options->session);
  command.add_option("--data", options->data, "LLaVA's JSON or JSONL")->required();
  command.add_option("--images", options->image_folder, "the folder of its pictures")->capture_default_str();
  command
      .add_option("--out", options->out,
                  "JSONL to write: {\"id\", \"num_tokens\", \"num_supervised\", \"nll_sum\"} a line")
      ->required();
  command.add_option("--max-tokens", options->max_tokens, "tokens computed at once")
      ->check(CLI::Range(1, 100000000))
      ->capture_default_str();
  command.add_option("--taps", options->taps,
                     "safetensors to write: the activations of every layer (docs/formats.md has the names)");
  command
      .add_option("--taps-samples", options->taps_samples,
                  "of how many samples, from the first on, in one row")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command.callback([options] { score(*options); });
}

}  // namespace caldera
