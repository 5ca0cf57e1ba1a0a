#include "train/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cmath>
#include <set>

#include "base/error.h"
#include "base/files.h"
#include "base/log.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

class CheckpointTest : public testing::Test {
 protected:
  void SetUp() override {
    previous_ = set_log_sink([this](LogLevel, const std::string& line) { log_ += line + "\n"; });
  }
  void TearDown() override { set_log_sink(previous_); }

  // An optimizer over one weight, after `num_updates` updates.
  struct Fixture {
    at::Tensor weight = at::ones({3, 2});
    std::unique_ptr<AdamW> optimizer;
    explicit Fixture(int num_updates) {
      weight.set_requires_grad(true);
      optimizer = std::make_unique<AdamW>(
          std::vector<ParameterGroup>{
              {"projector", 0.1, {{"multi_modal_projector.linear_1.weight", &weight}}}},
          AdamWOptions{});
      for (int i = 0; i < num_updates; ++i) update();
    }
    void update() {
      weight.mutable_grad() = at::arange(6, at::kFloat).view({3, 2}) - weight.detach();
      optimizer->take_gradients(false);
      optimizer->step(1, 1);
    }
  };
  void write(int64_t step, const KeptCheckpoints& kept = {}, std::optional<double> eval_loss = {}) {
    const Fixture fixture(static_cast<int>(step));
    write_checkpoint(
        folder_,
        {.state = {.step = step, .seed = 7, .eval_loss = eval_loss, .recipe = "r", .caldera = {{"card", 1}}},
         .masters = fixture.optimizer->masters(),
         .moments = fixture.optimizer->moments()},
        kept);
  }
  fs::path step(int64_t number) { return folder_ / "checkpoints" / fmt::format("step-{:08}", number); }

  TemporaryFolder temporary_;
  fs::path folder_ = temporary_.path();
  std::string log_;
  LogSink previous_;
};

TEST_F(CheckpointTest, RestoredOptimizerGoesOnBitForBit) {
  write(3);
  Fixture straight(3), restored(0);
  load_checkpoint(step(3), *restored.optimizer);
  for (int i = 0; i < 5; ++i) {
    straight.update();
    restored.update();
  }
  EXPECT_TRUE(at::equal(straight.weight, restored.weight));
  EXPECT_EQ(read_checkpoint_state(step(3)).seed, 7u);
}

TEST_F(CheckpointTest, KeepsTheNewestAndNamesThem) {
  for (int64_t n : {1, 2, 3}) write(n, {.save_total_limit = 2});
  EXPECT_FALSE(fs::exists(step(1)));
  EXPECT_TRUE(fs::exists(step(2)));
  EXPECT_EQ(read_file(folder_ / "latest"), "step-00000003\n");
  EXPECT_EQ(newest_checkpoint(folder_), step(3));
}

// Whatever the validation loss does, the lowest so far is among what is left, beside the newest two.
TEST_F(CheckpointTest, KeepsTheBestBesideTheNewest) {
  const std::vector<std::optional<double>> losses = {3.0,          1.5,  1.5,  std::nullopt, 2.0,
                                                     std::nan(""), 1.25, 1.75, 4.0};
  const std::vector<int64_t> best_after = {1, 2, 2, 2, 2, 2, 7, 7, 7};
  EXPECT_EQ(best_checkpoint(folder_), std::nullopt);
  for (int64_t n = 1; n <= static_cast<int64_t>(losses.size()); ++n) {
    const auto i = static_cast<size_t>(n - 1);
    write(n, {.save_total_limit = 2, .save_best = true}, losses[i]);
    std::set<fs::path> expected = {step(n), step(best_after[i])}, found;
    if (n > 1) expected.insert(step(n - 1));
    for (const auto& entry : fs::directory_iterator(folder_ / "checkpoints")) found.insert(entry.path());
    EXPECT_EQ(found, expected) << n;
    EXPECT_EQ(best_checkpoint(folder_), step(best_after[i])) << n;
    EXPECT_EQ(read_file(folder_ / "best"), step(best_after[i]).filename().string() + "\n") << n;
    EXPECT_EQ(read_file(folder_ / "latest"), step(n).filename().string() + "\n");
    EXPECT_EQ(newest_checkpoint(folder_), step(n));
    EXPECT_EQ(read_checkpoint_state(step(n)).eval_loss.has_value(), losses[i] && std::isfinite(*losses[i]))
        << n;
  }
  write(10, {.save_total_limit = 2});  // the best is no longer asked for
  EXPECT_FALSE(fs::exists(step(7)));
  EXPECT_FALSE(fs::exists(folder_ / "best"));
}

// Of the run as it was before it went back, nothing later is in the way: it would push out what is written
// now.
TEST_F(CheckpointTest, GoingBackToAnEarlierOneMovesTheLaterAside) {
  write(5, {.save_best = true}, 2.0);
  write(10, {.save_best = true}, 1.0);
  write_file_atomic(step(10) / "model.safetensors", "damaged");
  EXPECT_EQ(newest_checkpoint(folder_), step(5));
  fs::create_directories(folder_ / "checkpoints" / "step-00000009-mine");
  set_later_checkpoints_aside(folder_, step(5));
  EXPECT_EQ(read_file(folder_ / "latest"), "step-00000005\n");
  EXPECT_EQ(read_file(folder_ / "best"), "step-00000005\n");
  EXPECT_TRUE(fs::exists(folder_ / "checkpoints.old-1" / "step-00000010" / "optimizer.safetensors"));
  EXPECT_THAT(log_, HasSubstr("moved its step-00000010 to " + (folder_ / "checkpoints.old-1").string()));
  write(7, {.save_total_limit = 1, .save_best = true}, 1.5);
  EXPECT_EQ(newest_checkpoint(folder_), step(7));
  EXPECT_EQ(read_file(folder_ / "latest"), "step-00000007\n");
  EXPECT_EQ(read_file(folder_ / "best"), "step-00000007\n");
  EXPECT_FALSE(fs::exists(step(10)));
  EXPECT_FALSE(fs::exists(step(5)));
  EXPECT_TRUE(fs::exists(folder_ / "checkpoints" / "step-00000009-mine"));  // not ours
  set_later_checkpoints_aside(folder_, step(7));                            // nothing is later
  EXPECT_FALSE(fs::exists(folder_ / "checkpoints.old-2"));
  EXPECT_EQ(read_file(folder_ / "best"), "step-00000007\n");
}

TEST_F(CheckpointTest, ACheckpointFromElsewhereOrNoneMovesAllAside) {
  for (const bool from_elsewhere : {true, false}) {
    write(1);
    write(2, {.save_best = true}, 1.0);
    const fs::path other = folder_ / "elsewhere" / "step-00000001";
    if (from_elsewhere) {
      fs::create_directories(other.parent_path());
      fs::copy(step(1), other, fs::copy_options::recursive);
    }
    set_later_checkpoints_aside(folder_, from_elsewhere ? std::optional(other) : std::nullopt);
    EXPECT_EQ(newest_checkpoint(folder_), std::nullopt);
    EXPECT_FALSE(fs::exists(folder_ / "latest"));
    EXPECT_FALSE(fs::exists(folder_ / "best"));
    const fs::path aside = folder_ / (from_elsewhere ? "checkpoints.old-1" : "checkpoints.old-2");
    for (const char* name : {"step-00000001", "step-00000002"})
      EXPECT_NO_THROW(verify_checkpoint(aside / name));
  }
}

TEST_F(CheckpointTest, EveryFlippedByteIsFoundAndTheOneBeforeIsUsed) {
  write(1);
  write(2);
  for (const char* name :
       {"model.safetensors", "optimizer.safetensors", "trainer_state.json", "caldera.json"}) {
    const std::string good = read_file(step(2) / name);
    for (size_t at = 0; at < good.size(); at += 1 + good.size() / 40) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ 1);
      write_file_atomic(step(2) / name, bad);
      EXPECT_EQ(newest_checkpoint(folder_), step(1)) << name << " byte " << at;
    }
    EXPECT_THAT(log_, HasSubstr(name));
    write_file_atomic(step(2) / name, good.substr(0, good.size() / 2));
    EXPECT_EQ(newest_checkpoint(folder_), step(1)) << name << " cut";
    EXPECT_THAT(log_, HasSubstr("damaged: expected"));
    write_file_atomic(step(2) / name, good);
  }
  EXPECT_EQ(newest_checkpoint(folder_), step(2));
}

TEST_F(CheckpointTest, UnfinishedFoldersAreNoCheckpoints) {
  fs::create_directories(step(5));
  fs::create_directories(folder_ / "checkpoints" / "step-00000006.tmp-123");
  EXPECT_EQ(newest_checkpoint(folder_), std::nullopt);
  EXPECT_THAT(log_, HasSubstr("not a finished checkpoint: no manifest.json"));
}

TEST_F(CheckpointTest, OtherPartsOrShapesAreRefusedByName) {
  write(1);
  at::Tensor other = at::ones({3, 2});
  AdamW renamed({{"projector", 0.1, {{"multi_modal_projector.linear_9.weight", &other}}}}, {});
  EXPECT_THAT([&] { load_checkpoint(step(1), renamed); },
              testing::ThrowsMessage<CheckpointError>(
                  HasSubstr("tensor multi_modal_projector.linear_9.weight is missing")));
  at::Tensor wide = at::ones({3, 4});
  AdamW reshaped({{"projector", 0.1, {{"multi_modal_projector.linear_1.weight", &wide}}}}, {});
  EXPECT_THAT([&] { load_checkpoint(step(1), reshaped); },
              testing::ThrowsMessage<CheckpointError>(HasSubstr("expected shape [3, 4], got [3, 2]")));
}

}  // namespace
}  // namespace caldera
