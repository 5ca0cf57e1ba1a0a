// caldera score --model DIR --data FILE.json --images DIR --out FILE.jsonl
#include "eval/score.h"

#include <memory>

#include "base/files.h"
#include "base/json.h"
#include "cli/command.h"

namespace caldera {
namespace {

struct ScoreCommand {
  SessionOptions session;
  std::string data, image_folder = ".", out;
  int64_t max_tokens = 8192;
};

void score(const ScoreCommand& command) {
  const std::vector<Record> records = read_records(command.data);
  AtomicFile file(command.out);
  ModelSession session = open_model(command.session);
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
  command.callback([options] { score(*options); });
}

}  // namespace caldera
