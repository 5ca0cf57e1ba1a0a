#include "eval/heldout.h"

#include <algorithm>
#include <chrono>
#include <unordered_map>

#include "base/error.h"
#include "base/files.h"
#include "base/rng.h"
#include "base/strings.h"
#include "eval/answer.h"
#include "eval/score.h"

namespace caldera {
namespace {

constexpr uint64_t kDrawSeed = 0;

using AnswerCounts = std::map<std::string, int64_t>;

std::string majority(const AnswerCounts& counts) {
  const auto most = std::max_element(counts.begin(), counts.end(),
                                     [](const auto& a, const auto& b) { return a.second < b.second; });
  return most == counts.end() ? "" : most->first;
}

std::string question_text(const Turn& turn) { return strip(replace_all(turn.value, kImagePlaceholder, "")); }

// The last question and its expected answer; records without an answer have no place here.
const Turn& last_question(const Record& record) { return record.turns[record.turns.size() - 2]; }
const std::string& last_answer(const Record& record) { return record.turns.back().value; }

// At most `limit` records, drawn evenly from the whole file and kept in its order (files are often sorted by
// type).
std::vector<Record> draw(std::vector<Record> records, int64_t limit) {
  const auto num_records = static_cast<int64_t>(records.size());
  if (limit <= 0 || num_records <= limit) return records;
  std::vector<int64_t> order = Rng(kDrawSeed, num_records).permutation(num_records);
  order.resize(static_cast<size_t>(limit));
  std::sort(order.begin(), order.end());
  std::vector<Record> drawn;
  for (const int64_t index : order) drawn.push_back(std::move(records[static_cast<size_t>(index)]));
  return drawn;
}

std::vector<Record> read_answered(const fs::path& file, int64_t limit) {
  std::vector<Record> records = read_records(file);
  for (const Record& record : records)
    CALDERA_CHECK(record.turns.size() >= 2 && !record.turns.back().from_human, DataError,
                  "{}: record \"{}\": expected a question and its answer last, got no answer", file.string(),
                  record.id);
  return draw(std::move(records), limit);
}

double nll_per_token(const std::vector<Score>& scores) {
  double nll_sum = 0;
  int64_t num_supervised = 0;
  for (const Score& score : scores) {
    nll_sum += score.nll_sum;
    num_supervised += score.num_supervised;
  }
  return nll_sum / static_cast<double>(std::max<int64_t>(num_supervised, 1));
}

void count(Tally& tally, const HeldoutAnswer& answer) {
  tally.num_questions += 1;
  tally.num_right += answer.is_right ? 1 : 0;
  tally.num_blind_right += answer.is_blind_right ? 1 : 0;
}

Json to_json(const Tally& tally) {
  return {{"num_questions", tally.num_questions},
          {"exact_match", tally.exact_match()},
          {"exact_match_blind", tally.exact_match_blind()}};
}

double ratio(int64_t part, int64_t whole) {
  return whole > 0 ? static_cast<double>(part) / static_cast<double>(whole) : 0;
}

}  // namespace

double Tally::exact_match() const { return ratio(num_right, num_questions); }
double Tally::exact_match_blind() const { return ratio(num_blind_right, num_questions); }

std::string normalize_answer(const std::string& text) {
  std::string lower;
  for (const char c : text) lower += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  lower = strip(lower);
  if (lower.ends_with('.')) lower = strip(lower.substr(0, lower.size() - 1));
  std::string collapsed;
  for (const char c : lower) {
    const bool is_space = c == ' ' || (c >= '\t' && c <= '\r');
    if (is_space && collapsed.ends_with(' ')) continue;
    collapsed += is_space ? ' ' : c;
  }
  return collapsed;
}

std::vector<Record> with_other_pictures(const std::vector<Record>& records) {
  std::vector<std::string> pictures;
  std::unordered_map<std::string, size_t> place;
  for (const Record& record : records)
    for (const std::string& image : record.images)
      if (place.emplace(image, pictures.size()).second) pictures.push_back(image);
  if (pictures.size() < 2) return {};
  std::vector<Record> others = records;
  for (Record& record : others)
    for (std::string& image : record.images) image = pictures[(place.at(image) + 1) % pictures.size()];
  return others;
}

std::vector<std::string> blind_answers(const std::vector<Record>& records) {
  std::unordered_map<std::string, AnswerCounts> by_question, by_type;
  size_t num_asked = 0;
  for (const Record& record : records)
    for (size_t i = 0; i + 1 < record.turns.size(); i += 2, ++num_asked)
      by_question[question_text(record.turns[i])][normalize_answer(record.turns[i + 1].value)] += 1;
  // Where no question is ever repeated, each would be its own majority and blindness would be perfect.
  if (by_question.size() == num_asked) by_question.clear();
  for (const Record& record : records) by_type[record.type][normalize_answer(last_answer(record))] += 1;
  std::vector<std::string> answers;
  for (const Record& record : records)
    answers.push_back(majority(by_question.empty() ? by_type.at(record.type)
                                                   : by_question.at(question_text(last_question(record)))));
  return answers;
}

HeldoutData read_heldout(const EvaluationConfig& config) {
  HeldoutData data;
  data.questions = read_answered(config.data_path, config.max_questions);
  data.captions = config.captions_path.empty() ? data.questions
                                               : read_answered(config.captions_path, config.max_questions);
  std::erase_if(data.captions, [](const Record& record) { return record.images.empty(); });
  check_images(data.questions, config.image_folder, config.data_path);
  if (!config.captions_path.empty()) check_images(data.captions, config.image_folder, config.captions_path);
  return data;
}

HeldoutResult evaluate_heldout(LlavaModel& model, SampleFormat format, const EvaluationConfig& config,
                               const HeldoutData& data, const HeldoutOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  const at::NoGradGuard no_grad;
  const auto progress = [&](const std::string& what) {
    return [&options, what](int64_t done, int64_t num) {
      if (options.progress) options.progress(what, done, num);
    };
  };
  format.image_spec = model.image_spec();
  format.model_max_length = model.language->max_position_embeddings();
  if (!config.conversation_template.empty())
    format.conversation = &find_template(config.conversation_template);
  HeldoutResult result;

  // 1. Likelihood of the captions with the right picture and with another's.
  const std::vector<Record>& captions = data.captions;
  if (!captions.empty()) {
    const auto nll = [&](const std::vector<Record>& records, const char* what) {
      return nll_per_token(score_records(model, records, config.image_folder, format,
                                         options.max_tokens_per_batch, progress(what)));
    };
    result.num_captions = static_cast<int64_t>(captions.size());
    result.nll_right = nll(captions, "loss with the right picture");
    const std::vector<Record> others = with_other_pictures(captions);
    if (!others.empty()) result.nll_shuffled = nll(others, "loss with another picture");
  }

  // 2. Greedy answers.
  const std::vector<Record>& questions = data.questions;
  const std::vector<std::string> given = answer_records(
      model, questions, config.image_folder, format,
      {.max_new_tokens = config.max_new_tokens, .max_tokens_per_batch = options.max_tokens_per_batch},
      progress("answers"));
  const std::vector<std::string> blind = blind_answers(questions);

  // 3. The table.
  for (size_t i = 0; i < questions.size(); ++i) {
    const Record& record = questions[i];
    const std::string expected = normalize_answer(last_answer(record));
    HeldoutAnswer answer{.id = record.id,
                         .type = record.type,
                         .image = record.images.empty() ? "" : record.images.front(),
                         .question = question_text(last_question(record)),
                         .expected = last_answer(record),
                         .given = given[i],
                         .blind = blind[i],
                         .held_out = record.held_out,
                         .is_right = normalize_answer(given[i]) == expected,
                         .is_blind_right = blind[i] == expected};
    count(result.all, answer);
    if (!answer.type.empty()) count(result.by_type[answer.type], answer);
    if (answer.held_out) count(result.by_held_out[*answer.held_out], answer);
    result.answers.push_back(std::move(answer));
  }
  result.evaluation_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

Json to_json(const HeldoutResult& result, double train_seconds) {
  Json json = {{"nll_right", result.nll_right ? Json(*result.nll_right) : Json()},
               {"nll_shuffled", result.nll_shuffled ? Json(*result.nll_shuffled) : Json()},
               {"exact_match", result.all.exact_match()},
               {"exact_match_blind", result.all.exact_match_blind()},
               {"num_questions", result.all.num_questions},
               {"num_captions", result.num_captions},
               {"by_type", Json::object()},
               {"train_seconds", train_seconds},
               {"evaluation_seconds", result.evaluation_seconds}};
  for (const auto& [type, tally] : result.by_type) json["by_type"][type] = to_json(tally);
  for (const auto& [held_out, tally] : result.by_held_out)
    json["by_held_out"][held_out ? "held_out" : "seen"] = to_json(tally);
  return json;
}

}  // namespace caldera
