// A dataset ready to be read: records with their folder, template, tokenizer and picture settings; sample
// order; packing.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/batch.h"
#include "base/error.h"
#include "base/words.h"
#include "data/record.h"
#include "data/template.h"
#include "data/tokenizer.h"

namespace caldera {

// How records become samples; one for a whole run.
struct SampleFormat {
  std::shared_ptr<const Tokenizer> tokenizer;
  const ConversationTemplate* conversation = nullptr;
  ImageSpec image_spec;
  std::string image_aspect_ratio = "square";
  int64_t model_max_length = 2048;  // tokens, images expanded; the rest is cut off, as LLaVA does
};

// One sample, expanded: an image placeholder has become num_image_tokens times kImageTokenIndex.
struct Sample {
  std::string id;
  std::vector<int64_t> input_ids, labels;
  std::vector<at::Tensor> pixels;  // uint8 [3, Y, X] each
  int64_t num_supervised() const;  // labels[1..] that are not kIgnoreIndex
};

// Preprocessed pixels by image path, up to a number of bytes; what comes later is not kept. Small pictures
// stay small, so a run of many epochs decodes each but once. For one folder and one SampleFormat; safe from
// several threads.
class PixelCache {
 public:
  explicit PixelCache(int64_t max_bytes) : bytes_left_(max_bytes) {}
  at::Tensor find(const std::string& image) const;  // uint8 [3, Y, X]; undefined where absent
  void insert(const std::string& image, const at::Tensor& pixels);

 private:
  mutable std::mutex mutex_;
  std::unordered_map<std::string, at::Tensor> pixels_;
  int64_t bytes_left_;
};

// What work() returns; a DataError of it names the record.
template <class Work>
auto for_record(const Record& record, const Work& work) {
  try {
    return work();
  } catch (const DataError& error) {
    throw DataError(fmt::format("record \"{}\": {}", record.id, error.what()));
  }
}

// A picture as the tower is given it: uint8 [3, Y, X].
at::Tensor load_pixels(const ImageFolder& image_folder, const std::string& image, const SampleFormat& format);
// Tokenises and cuts to model_max_length. An image of which any token would be cut off is cut off whole, and
// so is all that follows it.
Sample make_sample_text(const Record& record, const SampleFormat& format);
// Decodes the pictures of a sample's text, or takes them from the cache. DataErrors name the record and the
// picture's file.
void load_pictures(Sample& sample, const Record& record, const ImageFolder& image_folder,
                   const SampleFormat& format, PixelCache* cache = nullptr);
// Both.
Sample make_sample(const Record& record, const ImageFolder& image_folder, const SampleFormat& format,
                   PixelCache* cache = nullptr);

// Places of the records of which model_max_length leaves nothing to learn: the cut comes before the first
// answer. A loader passes them over. `progress` is called now and then, with the number of records seen.
std::vector<size_t> cut_to_nothing(const std::vector<Record>& records, const SampleFormat& format,
                                   const std::function<void(int64_t)>& progress = {});
// The message on them: how many, the first ten by place and id, and what to do.
std::string cut_to_nothing_message(const std::vector<Record>& records, const std::vector<size_t>& places,
                                   const std::string& source, const SampleFormat& format);

// Packs samples into one row (see PackedBatch). Labels shift here: supervised_K are the rows *before*
// supervised ids. `for_loss`: without what no supervised row can see, the ids and pictures behind a sample's
// last one; its last id, at least. A sample of which nothing is supervised stays whole.
PackedBatch pack(const std::vector<Sample>& samples, bool for_loss = false);

// The order of samples in an epoch: a function of (seed, epoch) and the data alone.
class Sampler {
 public:
  // lengths: whitespace word counts, negative for text-only samples, as LLaVA's modality_lengths. Empty
  // lengths: plain shuffle. With lengths: group_by_modality_length with megabatches of `global_batch_size`.
  Sampler(int64_t num_samples, uint64_t seed, std::vector<int64_t> lengths = {},
          int64_t global_batch_size = 1);
  std::vector<int64_t> epoch_order(int64_t epoch) const;

 private:
  int64_t num_samples_;
  uint64_t seed_;
  std::vector<int64_t> lengths_;
  int64_t global_batch_size_;
};
std::vector<int64_t> modality_lengths(const std::vector<Record>& records);

// Deals samples of the given token counts into micro-batches of at most `max_tokens` each (a longer sample
// gets one of its own): first-fit decreasing, ties by position, micro-batches and their samples in order of
// first position. Returns indices into `lengths`.
std::vector<std::vector<int64_t>> plan_micro_batches(const std::vector<int64_t>& lengths, int64_t max_tokens);

// Deals samples of the given token counts to ranks, balanced by tokens: the longest first, each to the rank
// with the fewest tokens so far. A rank's samples are in order of position; it may get none. Returns indices
// into `lengths`.
std::vector<std::vector<int64_t>> deal_to_ranks(const std::vector<int64_t>& lengths, int num_ranks);

}  // namespace caldera
