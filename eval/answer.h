// Answers in words: prompts made from conversations, generated in packed batches.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/aten.h"
#include "eval/batches.h"
#include "model/generate.h"
#include "model/llava.h"

namespace caldera {

struct AnswerOptions {
  int64_t max_new_tokens = 512;
  double temperature = 0;  // 0: greedy
  double top_p = 1;
  uint64_t seed = 0;
  int64_t max_tokens_per_batch = 8192;  // prompts and the room for their answers
};

// The packed form of a conversation that waits for its answer: images expanded, nothing supervised. Throws
// DataError where the prompt leaves no room for an answer within format.model_max_length.
Sample make_prompt(const std::string& id, const std::vector<Turn>& turns, std::vector<at::Tensor> pixels,
                   const SampleFormat& format);

// The turns up to the last human one: what is asked. A final answer, if there is one, is left off.
std::vector<Turn> question_turns(const Record& record);

// The answer to the last human turn, without white space around it. `pixels`: uint8 [3, Y, X] for each
// <image>.
std::string answer(LlavaModel& model, const std::vector<Turn>& turns, const std::vector<at::Tensor>& pixels,
                   const SampleFormat& format, const AnswerOptions& options);

// Answers to the last question of each record, in the records' order; the batches change nothing but
// rounding. DataErrors name the record; a prompt that is too long throws before the first answer.
std::vector<std::string> answer_records(LlavaModel& model, const std::vector<Record>& records,
                                        const std::filesystem::path& image_folder, const SampleFormat& format,
                                        const AnswerOptions& options, const Progress& progress = {});

}  // namespace caldera
