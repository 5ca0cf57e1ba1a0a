// Which samples make a step, and how a step's samples are dealt into micro-batches.
#include <algorithm>
#include <iterator>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "data/dataset.h"

namespace caldera {
namespace {

// Words apart by whitespace, as Python's len(text.split()) counts them (ASCII whitespace).
int64_t count_words(const std::string& text) {
  int64_t count = 0;
  bool in_word = false;
  for (const char c : text) {
    const bool is_space = c == ' ' || (c >= '\t' && c <= '\r');
    count += !is_space && !in_word;
    in_word = !is_space;
  }
  return count;
}

}  // namespace

Sampler::Sampler(int64_t num_samples, uint64_t seed, std::vector<int64_t> lengths, int64_t global_batch_size)
    : num_samples_(num_samples),
      seed_(seed),
      lengths_(std::move(lengths)),
      global_batch_size_(global_batch_size) {
  CALDERA_ASSERT(num_samples_ >= 0 && global_batch_size_ > 0);
  CALDERA_ASSERT(lengths_.empty() || static_cast<int64_t>(lengths_.size()) == num_samples_);
}

std::vector<int64_t> Sampler::epoch_order(int64_t epoch) const {
  Rng rng(seed_, epoch);
  const std::vector<int64_t> shuffled = rng.permutation(num_samples_);
  if (lengths_.empty()) return shuffled;

  // LLaVA's get_modality_length_grouped_indices: megabatches of one modality each, in random order. The last
  // of each modality, full or not, takes no part in that: both come at the end as one, by position. Where
  // there is one modality alone, only what fills no megabatch comes last.
  const auto length = [&](int64_t i) { return lengths_[static_cast<size_t>(i)]; };
  const auto size = static_cast<size_t>(global_batch_size_);
  std::vector<std::vector<int64_t>> of_images, of_text;
  for (const int64_t i : shuffled) {
    std::vector<std::vector<int64_t>>& megabatches = length(i) < 0 ? of_text : of_images;
    if (megabatches.empty() || megabatches.back().size() == size) megabatches.emplace_back();
    megabatches.back().push_back(i);
  }
  std::vector<int64_t> rest;
  const bool is_mixed = !of_images.empty() && !of_text.empty();
  for (std::vector<std::vector<int64_t>>* megabatches : {&of_images, &of_text}) {
    if (megabatches->empty() || (!is_mixed && megabatches->back().size() == size)) continue;
    rest.insert(rest.end(), megabatches->back().begin(), megabatches->back().end());
    megabatches->pop_back();
  }
  std::vector<std::vector<int64_t>> megabatches = std::move(of_images);
  megabatches.insert(megabatches.end(), std::make_move_iterator(of_text.begin()),
                     std::make_move_iterator(of_text.end()));
  rng.shuffle(megabatches);
  const auto longest_first = [&](int64_t a, int64_t b) { return std::abs(length(a)) > std::abs(length(b)); };
  std::vector<int64_t> order;
  for (std::vector<int64_t>& batch : megabatches) {
    std::stable_sort(batch.begin(), batch.end(), longest_first);
    order.insert(order.end(), batch.begin(), batch.end());
  }
  if (is_mixed)
    std::sort(rest.begin(), rest.end());
  else
    std::stable_sort(rest.begin(), rest.end(), longest_first);
  order.insert(order.end(), rest.begin(), rest.end());
  return order;
}

std::vector<int64_t> modality_lengths(const std::vector<Record>& records) {
  std::vector<int64_t> lengths;
  for (const Record& record : records) {
    int64_t words = 0;
    for (const Turn& turn : record.turns) words += count_words(turn.value);
    lengths.push_back(record.images.empty() ? -words : words);
  }
  return lengths;
}

std::vector<std::vector<int64_t>> plan_micro_batches(const std::vector<int64_t>& lengths,
                                                     int64_t max_tokens) {
  std::vector<int64_t> by_length(lengths.size());
  std::iota(by_length.begin(), by_length.end(), int64_t{0});
  const auto length = [&](int64_t i) { return lengths[static_cast<size_t>(i)]; };
  std::stable_sort(by_length.begin(), by_length.end(),
                   [&](int64_t a, int64_t b) { return length(a) > length(b); });
  std::vector<std::vector<int64_t>> plan;
  std::vector<int64_t> room;  // tokens
  for (const int64_t i : by_length) {
    const auto fits = std::find_if(room.begin(), room.end(), [&](int64_t left) { return left >= length(i); });
    const auto bin = static_cast<size_t>(fits - room.begin());
    if (fits == room.end()) {
      room.push_back(max_tokens);
      plan.emplace_back();
    }
    room[bin] -= length(i);
    plan[bin].push_back(i);
  }
  for (std::vector<int64_t>& batch : plan) std::sort(batch.begin(), batch.end());
  std::sort(plan.begin(), plan.end());
  return plan;
}

std::vector<std::vector<int64_t>> deal_to_ranks(const std::vector<int64_t>& lengths, int num_ranks) {
  std::vector<int64_t> by_length(lengths.size());
  std::iota(by_length.begin(), by_length.end(), int64_t{0});
  std::stable_sort(by_length.begin(), by_length.end(), [&](int64_t a, int64_t b) {
    return lengths[static_cast<size_t>(a)] > lengths[static_cast<size_t>(b)];
  });
  std::vector<std::vector<int64_t>> dealt(static_cast<size_t>(num_ranks));
  std::vector<int64_t> tokens(dealt.size(), 0);
  for (const int64_t i : by_length) {
    const auto rank = static_cast<size_t>(std::min_element(tokens.begin(), tokens.end()) - tokens.begin());
    dealt[rank].push_back(i);
    tokens[rank] += lengths[static_cast<size_t>(i)];
  }
  for (std::vector<int64_t>& samples : dealt) std::sort(samples.begin(), samples.end());
  return dealt;
}

}  // namespace caldera
