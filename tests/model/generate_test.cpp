#include "model/generate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "tests/model/tiny_llava.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

const std::vector<std::vector<int64_t>> kPrompts = {{1, kImage, kImage, kImage, kImage, 5},
                                                    {7, 3, 30, 2, 9, 11, 4},
                                                    {12},
                                                    {1, kImage, kImage, kImage, kImage, 6, 2, 2}};

TEST(Generate, GreedyIsTheArgmaxOfTheWholeRowRunAgain) {
  const auto model = make_tiny_llava();
  const auto answers = generate(*model, make_batch(kPrompts), {.max_new_tokens = 12});
  ASSERT_EQ(answers.size(), kPrompts.size());
  for (const size_t s : {size_t{1}, size_t{2}}) {  // those without a picture
    std::vector<int64_t> ids = kPrompts[s], expected;
    for (int i = 0; i < 12; ++i) {
      expected.push_back(model->logits(make_batch({ids}))[-1].argmax().item<int64_t>());
      ids.push_back(expected.back());
    }
    EXPECT_EQ(answers[s], expected);
  }
}

TEST(Generate, BatchingChangesNoAnswer) {
  const auto model = make_tiny_llava();
  // Pictures of a batch are numbered through it, so only texts can be taken apart here.
  const std::vector<std::vector<int64_t>> prompts = {kPrompts[1], kPrompts[2], {3, 3, 8}};
  const auto together = generate(*model, make_batch(prompts), {.max_new_tokens = 9});
  for (size_t s = 0; s < prompts.size(); ++s)
    EXPECT_EQ(generate(*model, make_batch({prompts[s]}), {.max_new_tokens = 9})[0], together[s]);
}

TEST(Generate, ASequenceEndsAtItsOwnLengthWhateverIsBesideIt) {
  const auto model = make_tiny_llava();
  const std::vector<std::vector<int64_t>> prompts = {kPrompts[1], kPrompts[2]};  // of 7 and 1
  const auto free = generate(*model, make_batch(prompts), {.max_new_tokens = 6});
  const auto cut = generate(*model, make_batch(prompts), {.max_new_tokens = 6, .max_length = 9});
  EXPECT_EQ(cut[0], std::vector<int64_t>(free[0].begin(), free[0].begin() + 2));
  EXPECT_EQ(cut[1], free[1]);
  EXPECT_EQ(generate(*model, make_batch({prompts[1]}), {.max_new_tokens = 6, .max_length = 9})[0], cut[1]);
  EXPECT_EQ(generate(*model, make_batch({prompts[1]}), {.max_new_tokens = 99, .max_length = 9})[0].size(), 8);
}

TEST(Generate, StopsAtStopIdsAndLeavesThemOut) {
  const auto model = make_tiny_llava();
  const auto free = generate(*model, make_batch(kPrompts), {.max_new_tokens = 12});
  const int64_t stop = free[0][4];
  const auto stopped = generate(*model, make_batch(kPrompts), {.max_new_tokens = 12, .stop_ids = {stop}});
  for (size_t s = 0; s < free.size(); ++s) {
    const auto end = std::find(free[s].begin(), free[s].end(), stop);
    EXPECT_EQ(stopped[s], std::vector<int64_t>(free[s].begin(), end));
  }
  EXPECT_LE(stopped[0].size(), 4);
}

TEST(Generate, NeverProducesForbiddenIds) {
  const auto model = make_tiny_llava();
  for (const double temperature : {0.0, 5.0}) {
    GenerateOptions options{
        .max_new_tokens = 60, .temperature = temperature, .allowed_vocab = 20, .banned_ids = {3, 4, 99}};
    for (const auto& answer : generate(*model, make_batch(kPrompts), options)) {
      EXPECT_EQ(answer.size(), 60);
      for (const int64_t id : answer) EXPECT_TRUE(id >= 0 && id < 20 && id != 3 && id != 4) << id;
    }
  }
}

TEST(Generate, SamplingFollowsSeedSequenceAndPositionAlone) {
  const auto model = make_tiny_llava();
  const GenerateOptions options{.max_new_tokens = 10, .temperature = 2, .top_p = 0.9, .seed = 5};
  const auto answers = generate(*model, make_batch(kPrompts), options);
  EXPECT_EQ(generate(*model, make_batch(kPrompts), options), answers);
  EXPECT_EQ(generate(*model, make_batch({kPrompts[0]}), options)[0], answers[0]);  // alone or among others
  GenerateOptions other = options;
  other.seed = 6;
  EXPECT_NE(generate(*model, make_batch(kPrompts), other), answers);
  GenerateOptions second = options;
  second.numbers = {1};
  EXPECT_EQ(generate(*model, make_batch({kPrompts[1]}), second)[0], answers[1]);
  // Two equal prompts draw differently.
  const auto twins = generate(*model, make_batch({kPrompts[1], kPrompts[1]}), options);
  EXPECT_NE(twins[0], twins[1]);
}

TEST(Generate, SamplesInProportionToTheProbabilities) {
  const auto model = make_tiny_llava();
  const at::Tensor p = (model->logits(make_batch({{12}}))[0] / 4).softmax(-1);
  std::map<int64_t, int> counts, nucleus;
  const std::vector<std::vector<int64_t>> prompts(4000, {12});
  for (const auto& answer : generate(*model, make_batch(prompts), {.max_new_tokens = 1, .temperature = 4}))
    ++counts[answer[0]];
  for (const auto& [id, count] : counts) EXPECT_NEAR(count / 4000.0, p[id].item<double>(), 0.03) << id;
  for (const auto& answer :
       generate(*model, make_batch(prompts), {.max_new_tokens = 1, .temperature = 4, .top_p = 0.3}))
    ++nucleus[answer[0]];
  double mass = 0, smallest = 1;
  for (const auto& [id, count] : nucleus) {
    mass += p[id].item<double>();
    smallest = std::min(smallest, p[id].item<double>());
  }
  EXPECT_GE(mass, 0.3);
  EXPECT_LT(mass - smallest, 0.3);
  EXPECT_LT(nucleus.size(), counts.size());
}

TEST(Generate, ReportsTokensAndEndsWhereTheListenerSays) {
  const auto model = make_tiny_llava();
  std::vector<std::vector<int64_t>> heard(kPrompts.size());
  GenerateOptions options{.max_new_tokens = 8};
  options.on_token = [&](size_t index, int64_t token) {
    heard[index].push_back(token);
    return index != 1 || heard[1].size() < 3;
  };
  const auto answers = generate(*model, make_batch(kPrompts), options);
  EXPECT_EQ(answers, heard);
  EXPECT_EQ(answers[1].size(), 3);
  EXPECT_EQ(answers[0].size(), 8);
}

TEST(Generate, WorksInBfloat16) {
  const auto model = make_tiny_llava();
  model->to(at::kCPU, at::kBFloat16);
  for (const auto& answer : generate(*model, make_batch(kPrompts), {.max_new_tokens = 5}))
    EXPECT_EQ(answer.size(), 5);
}

TEST(Generate, EdgesAndErrors) {
  const auto model = make_tiny_llava();
  EXPECT_TRUE(generate(*model, make_batch({}), {}).empty());
  EXPECT_TRUE(generate(*model, make_batch(kPrompts), {.max_new_tokens = 0})[0].empty());
  EXPECT_THAT(
      [&] {
        generate(*model, make_batch({{1}, {}}), {});
      },
      ThrowsMessage<DataError>(HasSubstr("prompt 1 is empty")));
  EXPECT_THAT(
      [&] {
        generate(*model, make_batch({{1}, {1, 2, 3}}), {.max_length = 3});
      },
      ThrowsMessage<DataError>(HasSubstr("prompt 1 takes 3 of 3 positions")));
  EXPECT_THAT([&] { generate(*model, make_batch({{1}}), {.temperature = 1, .top_p = 0}); },
              ThrowsMessage<ConfigError>(HasSubstr("top_p: expected a number in (0, 1], got 0")));
}

}  // namespace
}  // namespace caldera
