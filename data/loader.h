// Steps of training, prepared in background threads, in an order that does not depend on their number.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/batch.h"
#include "data/dataset.h"

namespace caldera {

// All that one optimizer step consumes. Everything but `micro_batches` is the same on every rank.
struct StepData {
  int64_t step = 0;                        // from 0
  double epoch = 0;                        // position at the step's end, in epochs
  std::vector<PackedBatch> micro_batches;  // this rank's
  std::vector<std::string> sample_ids;     // of the whole step
  // Samples of the step that are in none of the numbers here: model_max_length leaves nothing of them to
  // learn.
  std::vector<std::string> passed_over;
  std::vector<int> ranks;                                      // which rank got each of them
  int64_t num_tokens = 0, num_supervised = 0, num_images = 0;  // of the whole step
  std::vector<int64_t> num_micro_batches;                      // of each rank
};

struct LoaderOptions {
  int64_t global_batch_size = 8;
  int64_t max_tokens_per_micro_batch = 8192;
  double num_epochs = 1;
  int64_t max_steps = 0;  // > 0: overrides num_epochs
  uint64_t seed = 0;
  bool group_by_modality_length = false;
  int num_workers = 2;
  int64_t prefetch_steps = 4;
  int rank = 0, num_ranks = 1;  // a step's samples are dealt to the ranks, balanced by tokens
};

// A dataset's steps from `first_step` on. Samples of which nothing is learned are passed over in their step,
// which may be left with none: no micro-batches then, num_supervised 0, and nothing to update. The last step
// of an epoch holds what is left of it (as HF's Trainer does with drop_last off): ceil(samples /
// global_batch_size) steps an epoch.
class Loader {
 public:
  Loader(std::shared_ptr<const std::vector<Record>> records, ImageFolder image_folder, SampleFormat format,
         LoaderOptions options, int64_t first_step = 0);
  ~Loader();
  int64_t num_steps() const;  // in the whole run
  // The next step's data; throws what its preparation threw (DataError with file and record). Ends with step
  // == num_steps().
  bool next(StepData& data);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Records in order as packed batches, for validation. Where there are several ranks they take turns: a rank
// makes every num_ranks-th batch, from that of its own number on.
struct PackedRecords {
  std::vector<PackedBatch> batches;             // this rank's
  int64_t num_batches = 0, num_supervised = 0;  // of all ranks
};
PackedRecords pack_all(const std::vector<Record>& records, const ImageFolder& image_folder,
                       const SampleFormat& format, int64_t max_tokens_per_micro_batch, int rank = 0,
                       int num_ranks = 1);

}  // namespace caldera
