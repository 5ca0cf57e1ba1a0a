// Likelihood of records under a model.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "eval/batches.h"
#include "model/llava.h"

namespace caldera {

struct Score {
  std::string id;
  int64_t num_tokens = 0;  // images expanded
  int64_t num_supervised = 0;
  double nll_sum = 0;  // nats, over the supervised tokens
};

// One score a record, in the records' order. Batches hold at most `max_tokens` tokens, which changes nothing
// but rounding. DataErrors name the record.
std::vector<Score> score_records(LlavaModel& model, const std::vector<Record>& records,
                                 const std::filesystem::path& image_folder, const SampleFormat& format,
                                 int64_t max_tokens, const Progress& progress = {});

}  // namespace caldera
