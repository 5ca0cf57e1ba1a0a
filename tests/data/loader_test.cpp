#include "data/loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "tests/aten.h"
#include "tests/data/fake_text.h"
#include "tests/support.h"

namespace caldera {
namespace {

using ::testing::HasSubstr;

std::shared_ptr<std::vector<Record>> make_records(int count) {
  auto records = std::make_shared<std::vector<Record>>();
  for (int i = 0; i < count; ++i) {
    const std::string id = fmt::format("r{}", i), answer(static_cast<size_t>(1 + i * 7 % 20), 'x');
    if (i % 3 == 0)
      records->push_back(fake_record(id, "text", answer));
    else
      records->push_back(fake_record(id, "<image>\nq", answer, {i % 3 == 1 ? "rgb.png" : "rgb.jpg"}));
  }
  return records;
}

LoaderOptions make_options(int num_workers) {
  LoaderOptions options;
  options.global_batch_size = 4;
  options.max_tokens_per_micro_batch = 40;
  options.num_epochs = 2.5;
  options.seed = 3;
  options.num_workers = num_workers;
  return options;
}

std::vector<StepData> run(const LoaderOptions& options, int64_t first_step = 0, int count = 22) {
  Loader loader(make_records(count), kGoldenPictures, fake_format(), options, first_step);
  std::vector<StepData> steps;
  for (StepData data; loader.next(data);) steps.push_back(std::move(data));
  return steps;
}

void expect_equal(const StepData& a, const StepData& b) {
  EXPECT_EQ(a.step, b.step);
  EXPECT_EQ(a.epoch, b.epoch);
  EXPECT_EQ(a.sample_ids, b.sample_ids);
  EXPECT_EQ(a.num_tokens, b.num_tokens);
  ASSERT_EQ(a.micro_batches.size(), b.micro_batches.size());
  for (size_t i = 0; i < a.micro_batches.size(); ++i) {
    const PackedBatch &x = a.micro_batches[i], &y = b.micro_batches[i];
    EXPECT_TRUE(at::equal(x.input_ids_T, y.input_ids_T));
    EXPECT_TRUE(at::equal(x.pixels_ICYX, y.pixels_ICYX));
    EXPECT_EQ(x.sample_ids, y.sample_ids);
  }
}

}  // namespace

TEST(Loader, AnEpochIsEverySampleOnce) {
  const std::vector<StepData> steps = run(make_options(2));
  ASSERT_EQ(steps.size(), 15u);  // ceil(2.5 * 6)
  std::multiset<std::string> seen;
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(steps[i].step, static_cast<int64_t>(i));
    EXPECT_EQ(steps[i].sample_ids.size(), i < 5 ? 4u : 2u);
    seen.insert(steps[i].sample_ids.begin(), steps[i].sample_ids.end());
  }
  EXPECT_EQ(std::set<std::string>(seen.begin(), seen.end()).size(), 22u);
  EXPECT_DOUBLE_EQ(steps[0].epoch, 4.0 / 22);
  EXPECT_DOUBLE_EQ(steps[5].epoch, 1.0);
  EXPECT_DOUBLE_EQ(steps[6].epoch, 1 + 4.0 / 22);
}

TEST(Loader, CountsWhatAStepHolds) {
  for (const StepData& step : run(make_options(2))) {
    int64_t num_tokens = 0, num_supervised = 0, num_images = 0;
    std::multiset<std::string> ids;
    for (const PackedBatch& batch : step.micro_batches) {
      EXPECT_LE(batch.num_tokens(), 40);
      num_tokens += batch.num_tokens();
      num_supervised += batch.supervised_K.numel();
      num_images += batch.num_images();
      ids.insert(batch.sample_ids.begin(), batch.sample_ids.end());
    }
    EXPECT_EQ(step.num_tokens,
              num_tokens + std::ssize(step.sample_ids));  // each one's last id is a label alone
    EXPECT_EQ(step.num_supervised, num_supervised);
    EXPECT_EQ(step.num_images, num_images);
    EXPECT_EQ(ids, std::multiset<std::string>(step.sample_ids.begin(), step.sample_ids.end()));
  }
}

TEST(Loader, TheNumberOfWorkersChangesNothing) {
  for (const bool grouped : {false, true}) {
    LoaderOptions one = make_options(1), many = make_options(5);
    one.group_by_modality_length = many.group_by_modality_length = grouped;
    many.prefetch_steps = 9;
    const std::vector<StepData> a = run(one), b = run(many);
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) expect_equal(a[i], b[i]);
  }
}

TEST(Loader, ResumingGoesOnWhereItWas) {
  const std::vector<StepData> whole = run(make_options(2)), rest = run(make_options(3), /*first_step=*/8);
  ASSERT_EQ(rest.size(), 7u);
  for (size_t i = 0; i < rest.size(); ++i) expect_equal(whole[i + 8], rest[i]);
  EXPECT_TRUE(run(make_options(2), /*first_step=*/15).empty());
}

TEST(Loader, MaxStepsOverridesEpochs) {
  LoaderOptions options = make_options(2);
  options.max_steps = 20;
  EXPECT_EQ(run(options).size(), 20u);
}

TEST(Loader, ABrokenPictureIsAnErrorOfItsStep) {
  for (const int num_workers : {1, 4}) {
    auto records = make_records(8);
    (*records)[5].images = {"missing.png"};
    LoaderOptions options = make_options(num_workers);
    options.global_batch_size = 8;
    Loader loader(records, kGoldenPictures, fake_format(), options);
    StepData data;
    EXPECT_THAT(error_of<DataError>([&] { loader.next(data); }), HasSubstr("record \"r5\""));
  }
  EXPECT_THAT(error_of<DataError>([] {
                Loader(std::make_shared<std::vector<Record>>(), kGoldenPictures, fake_format(),
                       make_options(1));
              }),
              HasSubstr("no records"));
}

TEST(Loader, WhatIsCutToNothingIsPassedOverOnEveryRankAlike) {
  auto records = make_records(22);
  const std::string long_question(60, 'q');  // of a model_max_length of 50
  for (const size_t i : {2, 3, 11})
    (*records)[i].turns[0].value = (i == 3 ? "" : "<image>\n") + long_question;
  (*records)[11].images = {"missing.png"};  // nobody looks at it
  const SampleFormat format = fake_format(8, 4, /*max_length=*/50);
  const auto run_rank = [&](int rank, int num_ranks, int64_t first_step) {
    LoaderOptions options = make_options(2);
    options.rank = rank;
    options.num_ranks = num_ranks;
    options.num_epochs = 1;
    Loader loader(records, kGoldenPictures, format, options, first_step);
    std::vector<StepData> steps;
    for (StepData data; loader.next(data);) steps.push_back(std::move(data));
    return steps;
  };
  const std::vector<StepData> whole = run_rank(0, 1, 0);
  ASSERT_EQ(whole.size(), 6u);
  std::multiset<std::string> passed_over, used;
  for (const StepData& step : whole) {
    passed_over.insert(step.passed_over.begin(), step.passed_over.end());
    used.insert(step.sample_ids.begin(), step.sample_ids.end());
    for (const PackedBatch& batch : step.micro_batches)
      for (const int64_t num_supervised : batch.num_supervised) EXPECT_GT(num_supervised, 0);
  }
  EXPECT_EQ(passed_over, (std::multiset<std::string>{"r11", "r2", "r3"}));
  EXPECT_EQ(used.size(), 19u);
  for (const int rank : {0, 1, 2}) {
    const std::vector<StepData> steps = run_rank(rank, 3, 0);
    ASSERT_EQ(steps.size(), whole.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      EXPECT_EQ(steps[i].passed_over, whole[i].passed_over);
      EXPECT_EQ(steps[i].sample_ids, whole[i].sample_ids);
      EXPECT_EQ(steps[i].num_tokens, whole[i].num_tokens);
      EXPECT_EQ(steps[i].num_images, whole[i].num_images);
    }
  }
  const std::vector<StepData> resumed = run_rank(0, 1, 3);
  for (size_t i = 0; i < resumed.size(); ++i) {
    expect_equal(resumed[i], whole[i + 3]);
    EXPECT_EQ(resumed[i].passed_over, whole[i + 3].passed_over);
  }
}

TEST(Loader, AStepOfWhichNothingIsLeftIsAnEmptyStep) {
  const auto records = std::make_shared<std::vector<Record>>(
      std::vector<Record>{fake_record("long", std::string(60, 'q'), "x"), fake_record("good", "q", "x")});
  for (const int num_ranks : {1, 2}) {
    LoaderOptions options = make_options(1);
    options.global_batch_size = 1;
    options.num_epochs = 1;
    options.num_ranks = num_ranks;
    Loader loader(records, kGoldenPictures, fake_format(8, 4, 50), options);
    int num_empty = 0;
    for (StepData data; loader.next(data);) {
      if (data.passed_over.empty()) {
        EXPECT_THAT(data.sample_ids, ::testing::ElementsAre("good"));
        continue;
      }
      ++num_empty;
      EXPECT_THAT(data.passed_over, ::testing::ElementsAre("long"));
      EXPECT_TRUE(data.sample_ids.empty() && data.micro_batches.empty());
      EXPECT_EQ(data.num_tokens + data.num_supervised + data.num_images, 0);
      EXPECT_EQ(data.num_micro_batches, std::vector<int64_t>(static_cast<size_t>(num_ranks)));
    }
    EXPECT_EQ(num_empty, 1);
  }
}

TEST(Loader, MayBeLeftAtAnyTime) {
  Loader loader(make_records(22), kGoldenPictures, fake_format(), make_options(3));
  StepData data;
  EXPECT_TRUE(loader.next(data));
}

TEST(Loader, PackAllKeepsTheOrder) {
  const auto records = make_records(10);
  std::vector<std::string> ids;
  const PackedRecords packed = pack_all(*records, kGoldenPictures, fake_format(), 40);
  EXPECT_EQ(packed.num_batches, std::ssize(packed.batches));
  int64_t num_supervised = 0;
  for (const PackedBatch& batch : packed.batches) {
    num_supervised += batch.supervised_K.numel();
    EXPECT_LE(batch.num_tokens(), 40);
    ids.insert(ids.end(), batch.sample_ids.begin(), batch.sample_ids.end());
  }
  ASSERT_EQ(ids.size(), 10u);
  for (size_t i = 0; i < 10; ++i) EXPECT_EQ(ids[i], fmt::format("r{}", i));
  EXPECT_EQ(packed.num_supervised, num_supervised);
}

TEST(Loader, RanksTakeTurnsInPackAll) {
  auto records = make_records(10);
  const PackedRecords whole = pack_all(*records, kGoldenPictures, fake_format(), 40);
  ASSERT_GT(whole.num_batches, 3);
  for (const int num_ranks : {2, 3, 20}) {
    int64_t num_batches = 0;
    for (int rank = 0; rank < num_ranks; ++rank) {
      const PackedRecords mine = pack_all(*records, kGoldenPictures, fake_format(), 40, rank, num_ranks);
      EXPECT_EQ(mine.num_batches, whole.num_batches);
      EXPECT_EQ(mine.num_supervised, whole.num_supervised);
      num_batches += std::ssize(mine.batches);
      for (size_t i = 0; i < mine.batches.size(); ++i) {
        const PackedBatch &got = mine.batches[i],
                          &expected =
                              whole.batches[i * static_cast<size_t>(num_ranks) + static_cast<size_t>(rank)];
        EXPECT_EQ(got.sample_ids, expected.sample_ids);
        EXPECT_TRUE(at::equal(got.input_ids_T, expected.input_ids_T));
        EXPECT_TRUE(at::equal(got.pixels_ICYX, expected.pixels_ICYX));
      }
    }
    EXPECT_EQ(num_batches, whole.num_batches);
  }
  // A rank decodes its own pictures alone: another's may be broken.
  (*records)[1].images = {"missing.png"};
  ASSERT_THAT(whole.batches[0].sample_ids, ::testing::Contains("r1"));
  EXPECT_THAT(error_of<DataError>([&] { pack_all(*records, kGoldenPictures, fake_format(), 40, 0, 2); }),
              HasSubstr("record \"r1\""));
  EXPECT_EQ(error_of<DataError>([&] { pack_all(*records, kGoldenPictures, fake_format(), 40, 1, 2); }),
            "accepted");
}

TEST(Loader, RanksShareTheSameSteps) {
  const std::vector<StepData> whole = run(make_options(2));
  for (const int num_ranks : {2, 3, 5}) {
    std::vector<std::vector<StepData>> of_rank;
    for (int rank = 0; rank < num_ranks; ++rank) {
      LoaderOptions options = make_options(2);
      options.rank = rank;
      options.num_ranks = num_ranks;
      of_rank.push_back(run(options));
      ASSERT_EQ(of_rank.back().size(), whole.size());
    }
    for (size_t step = 0; step < whole.size(); ++step) {
      std::multiset<std::string> dealt;
      for (int rank = 0; rank < num_ranks; ++rank) {
        const StepData& data = of_rank[static_cast<size_t>(rank)][step];
        EXPECT_EQ(data.sample_ids, whole[step].sample_ids);  // everybody knows them all
        EXPECT_EQ(data.epoch, whole[step].epoch);
        EXPECT_EQ(data.num_tokens, whole[step].num_tokens);
        EXPECT_EQ(data.num_supervised, whole[step].num_supervised);
        EXPECT_EQ(data.num_images, whole[step].num_images);
        EXPECT_EQ(data.num_micro_batches, of_rank[0][step].num_micro_batches);
        EXPECT_EQ(data.num_micro_batches[static_cast<size_t>(rank)],
                  static_cast<int64_t>(data.micro_batches.size()));
        for (const PackedBatch& batch : data.micro_batches)
          dealt.insert(batch.sample_ids.begin(), batch.sample_ids.end());
      }
      EXPECT_EQ(dealt,
                std::multiset<std::string>(whole[step].sample_ids.begin(), whole[step].sample_ids.end()));
    }
  }
}

}  // namespace caldera
