// caldera eval heldout --model DIR --data FILE.json --images DIR [--captions FILE.json] [--out DIR]
#include <cstdio>
#include <memory>

#include "base/files.h"
#include "base/json.h"
#include "cli/command.h"
#include "eval/heldout.h"
#include "eval/report.h"

namespace caldera {
namespace {

struct HeldoutCommand {
  SessionOptions session;
  EvaluationConfig evaluation{.max_questions = 0};
  std::string out;
};

void heldout(const HeldoutCommand& command) {
  const HeldoutData data = read_heldout(command.evaluation);
  ModelSession session = open_model(command.session);
  const HeldoutResult result = evaluate_heldout(*session.model, session.format, command.evaluation, data,
                                                {.progress = progress_line()});
  const Json json = to_json(result, 0);
  fmt::print("{}\n", json.dump(2, ' ', false, Json::error_handler_t::replace));
  if (command.out.empty()) return;
  const fs::path out = command.out;
  fs::create_directories(out);
  write_json(out / "results.json", json);
  write_file_atomic(out / "answers.jsonl", answers_jsonl(result));
  write_report({.output = out,
                .model = command.session.model,
                .title = "Caldera: held-out questions",
                .result = result,
                .image_folder = command.evaluation.image_folder,
                .num_sheet = command.evaluation.num_sheet});
}

void setup_heldout(CLI::App& command) {
  auto options = std::make_shared<HeldoutCommand>();
  EvaluationConfig& evaluation = options->evaluation;
  add_session_options(command, options->session);
  command
      .add_option("--data", evaluation.data_path, "questions with expected answers: LLaVA's JSON or JSONL")
      ->required();
  command.add_option("--captions", evaluation.captions_path,
                     "samples for the loss with the right and another picture (default: --data)");
  command.add_option("--images", evaluation.image_folder, "the folder of the pictures")->required();
  command.add_option("--max-questions", evaluation.max_questions, "at most this many, drawn evenly; 0: all")
      ->capture_default_str();
  command.add_option("--max-new-tokens", evaluation.max_new_tokens, "longest answer")->capture_default_str();
  command.add_option("--num-sheet", evaluation.num_sheet, "pictures on the sheet")->capture_default_str();
  command.add_option("--out", options->out,
                     "folder for results.json, answers.jsonl, report.html and sheet.png");
  command.callback([options] { heldout(*options); });
}

}  // namespace

void setup_eval(CLI::App& command) {
  command.require_subcommand(1);
  setup_heldout(
      *command.add_subcommand("heldout", "exact match, and loss with the right and with another picture"));
}

}  // namespace caldera
