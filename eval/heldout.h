// What a recipe measures at its end on data it never trained on: whether the model reads the picture (loss
// with the right picture against another's), and whether its answers are right, next to the best that never
// looks.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "data/dataset.h"
#include "model/llava.h"
#include "train/recipe.h"

namespace caldera {

// One question with what was expected and what the model answered.
struct HeldoutAnswer {
  std::string id, type;
  std::string image;                      // relative to the image folder; "" for text alone
  std::string question, expected, given;  // the question without its placeholder
  std::string blind;                      // what answering without looking gives
  std::optional<bool> held_out;           // the record's "held_out", where it has one
  bool is_right = false, is_blind_right = false;
};

struct Tally {
  int64_t num_questions = 0, num_right = 0, num_blind_right = 0;
  double exact_match() const;  // 0 where there are no questions
  double exact_match_blind() const;
};

struct HeldoutResult {
  // Nats per supervised token over the captions; the shuffled one is absent where all show one picture.
  std::optional<double> nll_right, nll_shuffled;
  int64_t num_captions = 0;
  Tally all;
  std::map<std::string, Tally> by_type;  // "" is left out
  std::map<bool, Tally> by_held_out;     // of the records that say so
  std::vector<HeldoutAnswer> answers;
  double evaluation_seconds = 0;
};

// The records to measure on.
struct HeldoutData {
  std::vector<Record> captions;   // with pictures
  std::vector<Record> questions;  // each with its answer last
};

// Reads config.captions_path and config.data_path (of each at most max_questions, drawn by a fixed seed) and
// looks at their pictures: what is wrong with them shows before a model is opened. Throws DataError with the
// file.
HeldoutData read_heldout(const EvaluationConfig& config);

struct HeldoutOptions {
  int64_t max_tokens_per_batch = 8192;
  std::function<void(const std::string& what, int64_t done, int64_t total)> progress;
};

// Greedy answers to the questions and likelihoods of the captions. `format`'s template gives way to
// config.conversation_template where that is set. Throws DataError with the record.
HeldoutResult evaluate_heldout(LlavaModel& model, SampleFormat format, const EvaluationConfig& config,
                               const HeldoutData& data, const HeldoutOptions& options = {});

// What stands in results.json; `train_seconds` is the caller's.
Json to_json(const HeldoutResult& result, double train_seconds);

// The parts, for tests and other benchmarks.

// An answer as it is compared: without white space around, in lower case (ASCII), without a final period,
// spaces collapsed.
std::string normalize_answer(const std::string& text);

// Records with each picture replaced by the next distinct one (in order of first appearance, the last by the
// first): a fixed derangement of the pictures. Empty where there are fewer than two distinct pictures.
// Text-only records stay as they are.
std::vector<Record> with_other_pictures(const std::vector<Record>& records);

// The answer that never looks, for each record: the majority answer (normalised; ties: the alphabetically
// first) to the same question, or, where no question is ever repeated, to questions of its type. Taken from
// the records themselves, it is an upper bound on what any answer without the picture can reach.
std::vector<std::string> blind_answers(const std::vector<Record>& records);

}  // namespace caldera
