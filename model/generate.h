// Text generation with a key/value cache, many sequences at once.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "base/batch.h"
#include "model/llava.h"

namespace caldera {

struct GenerateOptions {
  int64_t max_new_tokens = 512;
  int64_t max_length = 0;  // of a prompt with its answer, each sequence for itself (0: any)
  double temperature = 0;  // 0: greedy
  double top_p = 1;
  // With the sequence's number and position decides each draw: order and batching do not matter.
  uint64_t seed = 0;
  std::vector<int64_t> numbers;     // each sequence's number (empty: its index)
  std::vector<int64_t> stop_ids;    // ends a sequence; not part of the answer
  int64_t allowed_vocab = 0;        // ids from here on are never produced (0: all may be)
  std::vector<int64_t> banned_ids;  // never produced (the image placeholder's id)
  // Called after each new token of sequence `index`; return false to end that sequence.
  std::function<bool(size_t index, int64_t token)> on_token;
};

// `prompts` is a packed batch of S prompts (its supervised part is ignored). Prefill is one packed forward;
// each step then runs all unfinished sequences as one packed row of one token each. Returns the new ids of
// each sequence. Throws DataError for a prompt that is empty or leaves no room below max_length.
std::vector<std::vector<int64_t>> generate(LlavaModel& model, const PackedBatch& prompts,
                                           const GenerateOptions& options);

}  // namespace caldera
