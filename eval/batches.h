// Any number of samples as packed batches, made window by window in background threads: memory stays flat.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

#include "base/batch.h"
#include "data/dataset.h"

namespace caldera {

// (done, total): items finished; called with 0 when the work begins.
using Progress = std::function<void(int64_t, int64_t)>;

struct SampleSource {
  int64_t num_samples = 0;
  std::function<int64_t(int64_t index)> num_tokens;  // what a sample counts against the budget
  std::function<Sample(int64_t index)> make;         // called from background threads
};

// Calls visit(indices, batch) with batches of at most `max_tokens` (a larger sample alone). Samples come once
// each, near their order but not in it: `indices` says which ones a batch holds. Throws what making a sample
// threw.
void visit_batches(
    const SampleSource& source, int64_t max_tokens,
    const std::function<void(const std::vector<int64_t>& indices, const PackedBatch& batch)>& visit);

}  // namespace caldera
