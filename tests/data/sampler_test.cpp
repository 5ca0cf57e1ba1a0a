#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "tests/data/fake_text.h"

namespace caldera {
namespace {

std::vector<int64_t> sorted(std::vector<int64_t> order) {
  std::sort(order.begin(), order.end());
  return order;
}

TEST(DealToRanks, BalancesTokensAndKeepsEachSampleOnce) {
  const std::vector<int64_t> lengths = {10, 90, 20, 80, 30, 70, 40, 60};
  const auto dealt = deal_to_ranks(lengths, 3);
  std::vector<int64_t> all;
  for (const std::vector<int64_t>& samples : dealt) {
    int64_t tokens = 0;
    for (const int64_t i : samples) tokens += lengths[static_cast<size_t>(i)];
    EXPECT_NEAR(static_cast<double>(tokens), 400.0 / 3, 20);
    EXPECT_TRUE(std::is_sorted(samples.begin(), samples.end()));
    all.insert(all.end(), samples.begin(), samples.end());
  }
  std::sort(all.begin(), all.end());
  EXPECT_EQ(all, (std::vector<int64_t>{0, 1, 2, 3, 4, 5, 6, 7}));
}

TEST(DealToRanks, MoreRanksThanSamplesLeaveSomeWithout) {
  EXPECT_EQ(deal_to_ranks({5, 7}, 4), (std::vector<std::vector<int64_t>>{{1}, {0}, {}, {}}));
  EXPECT_EQ(deal_to_ranks({5, 7}, 1), (std::vector<std::vector<int64_t>>{{0, 1}}));
}

}  // namespace

TEST(Sampler, AnEpochIsAPermutationOfSeedAndEpoch) {
  const Sampler sampler(100, 7);
  std::vector<int64_t> all(100);
  for (int64_t i = 0; i < 100; ++i) all[static_cast<size_t>(i)] = i;
  EXPECT_EQ(sorted(sampler.epoch_order(0)), all);
  EXPECT_EQ(sampler.epoch_order(3), Sampler(100, 7).epoch_order(3));
  EXPECT_NE(sampler.epoch_order(0), sampler.epoch_order(1));
  EXPECT_NE(sampler.epoch_order(0), Sampler(100, 8).epoch_order(0));
  EXPECT_NE(sampler.epoch_order(0), all);
}

TEST(Sampler, LengthsAreWordsNegativeForText) {
  const std::vector<Record> records = {fake_record("a", "one  two\nthree", "four "),
                                       fake_record("b", "<image>\nWhat is it?", "A cat", {"x.png"})};
  EXPECT_THAT(modality_lengths(records), ::testing::ElementsAre(-4, 6));
}

TEST(Sampler, GroupsStepsByModalityAndLength) {
  std::vector<int64_t> lengths;  // 37 with a picture, 21 text-only
  for (int64_t i = 0; i < 58; ++i) lengths.push_back(i % 11 < 7 ? 1 + i * 13 % 50 : -1 - i * 7 % 50);
  const int64_t num_images = std::count_if(lengths.begin(), lengths.end(), [](int64_t l) { return l > 0; });
  const Sampler sampler(58, 1, lengths, 8);
  const std::vector<int64_t> order = sampler.epoch_order(2);
  EXPECT_EQ(sorted(order), sorted(Sampler(58, 1).epoch_order(0)));
  EXPECT_EQ(order, Sampler(58, 1, lengths, 8).epoch_order(2));
  EXPECT_NE(order, sampler.epoch_order(3));
  const int64_t num_pure = num_images / 8 + (58 - num_images) / 8;
  std::set<bool> seen;
  for (int64_t step = 0; step < num_pure; ++step) {
    int64_t previous = 1000;
    const bool is_text = lengths[static_cast<size_t>(order[static_cast<size_t>(step * 8)])] < 0;
    seen.insert(is_text);
    for (int64_t i = step * 8; i < step * 8 + 8; ++i) {
      const int64_t length = lengths[static_cast<size_t>(order[static_cast<size_t>(i)])];
      EXPECT_EQ(length < 0, is_text) << "a mixed step " << step;
      EXPECT_LE(std::abs(length), previous);
      previous = std::abs(length);
    }
  }
  EXPECT_EQ(seen.size(), 2u);
}

}  // namespace caldera
