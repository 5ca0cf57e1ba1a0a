// LLaVA's get_modality_length_grouped_indices (llava/train/llava_trainer.py) cuts each modality into
// megabatches, takes the last of each out of the shuffle, full or not, and appends both at the end, sorted by
// position.
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "data/dataset.h"

namespace caldera {
namespace {

constexpr int64_t kMegabatch = 4;

// Samples with a picture first, then text-only ones.
std::vector<int64_t> lengths_of(int64_t num_images, int64_t num_texts) {
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < num_images + num_texts; ++i)
    lengths.push_back(i < num_images ? 1 + i % 7 : -1 - i % 5);
  return lengths;
}

struct Grouped {
  std::vector<int64_t> order;
  std::vector<bool> is_mixed;  // of each megabatch of the order
};

Grouped group(int64_t num_images, int64_t num_texts, int64_t epoch) {
  const std::vector<int64_t> lengths = lengths_of(num_images, num_texts);
  Grouped grouped{Sampler(num_images + num_texts, 3, lengths, kMegabatch).epoch_order(epoch), {}};
  for (size_t begin = 0; begin < grouped.order.size(); begin += kMegabatch) {
    std::set<bool> modalities;
    for (size_t i = begin; i < std::min(begin + kMegabatch, grouped.order.size()); ++i)
      modalities.insert(grouped.order[i] < num_images);
    grouped.is_mixed.push_back(modalities.size() == 2);
  }
  return grouped;
}

}  // namespace

TEST(ModalityGroups, TheLastMegabatchesStayAtTheEndEvenWhenFull) {
  std::set<bool> first_is_image;
  for (int64_t epoch = 0; epoch < 20; ++epoch) {
    const Grouped grouped = group(12, 8, epoch);  // three megabatches and two, all full
    // The last two hold one of each modality; by position, the pictures stand before the texts.
    const std::vector<int64_t> tail(grouped.order.end() - 2 * kMegabatch, grouped.order.end());
    EXPECT_TRUE(std::is_sorted(tail.begin(), tail.end()));
    EXPECT_EQ(std::count_if(tail.begin(), tail.end(), [](int64_t i) { return i < 12; }), kMegabatch);
    EXPECT_EQ(std::count(grouped.is_mixed.begin(), grouped.is_mixed.end(), true), 0);
    first_is_image.insert(grouped.order.front() < 12);
  }
  EXPECT_EQ(first_is_image.size(), 2u);  // those before are shuffled
}

TEST(ModalityGroups, IncompleteOnesShareTheLastSteps) {
  const Grouped grouped = group(13, 7, 0);  // 4 + 4 + 4 + 1 and 4 + 3
  EXPECT_EQ(grouped.is_mixed, (std::vector<bool>{false, false, false, false, true}));
  EXPECT_TRUE(std::is_sorted(grouped.order.end() - kMegabatch, grouped.order.end()));
}

TEST(ModalityGroups, OneModalityAloneShufflesAllThatAreFull) {
  std::set<std::vector<int64_t>> last;
  const std::vector<int64_t> lengths = lengths_of(8, 0);
  for (int64_t epoch = 0; epoch < 20; ++epoch) {
    const std::vector<int64_t> order = group(8, 0, epoch).order;
    for (size_t i : {1u, 2u, 3u, 5u, 6u, 7u})  // longest first in each
      EXPECT_GE(lengths[static_cast<size_t>(order[i - 1])], lengths[static_cast<size_t>(order[i])]);
    last.insert({order.end() - kMegabatch, order.end()});
  }
  EXPECT_GT(last.size(), 10u);
}

}  // namespace caldera
