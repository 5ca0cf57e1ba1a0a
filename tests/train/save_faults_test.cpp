// A process killed at each write, flush and rename of a save, and disks that fail at each: what is found
// afterwards is always whole.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/error.h"
#include "base/fault.h"
#include "base/files.h"
#include "base/log.h"
#include "tests/aten.h"
#include "tests/support.h"
#include "train/checkpoint.h"

namespace caldera {
namespace {

CheckpointShare share(int64_t step) {
  return {.state = {.step = step, .seed = 7, .recipe = "r", .caldera = {{"card", 1}}},
          .masters = {{"weight", Master::of(at::full({300}, static_cast<double>(step)))}},
          .moments = {{"exp_avg.weight", Master::of(at::full({300}, static_cast<double>(step)))}}};
}
// Step 1 is the best, whatever comes.
CheckpointShare measured_share(int64_t step) {
  CheckpointShare result = share(step);
  result.state.eval_loss = static_cast<double>(step);
  return result;
}

class SaveFaults : public testing::Test {
 protected:
  void SetUp() override {
    previous_ = set_log_sink([this](LogLevel, const std::string& line) { log_ += line + "\n"; });
  }
  void TearDown() override { set_log_sink(previous_); }
  void start_over(const std::vector<int64_t>& steps) {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    for (const int64_t step : steps) write_checkpoint(folder_, measured_share(step), kept_);
  }
  // Saves in a process of its own, under a fault. Returns how it ended, as waitpid gives it.
  int save_in_child(int64_t step, const std::string& fault) {
    const pid_t child = ::fork();
    if (child == 0) {
      plan_faults(fault);
      try {
        write_checkpoint(folder_, measured_share(step), kept_);
      } catch (const std::exception& error) {
        write_file_atomic(folder_ / "error", error.what());
        ::_exit(1);
      }
      ::_exit(0);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    return status;
  }
  // The step of the newest checkpoint, whose tensors are checked; 0: none.
  int64_t newest_step() const {
    const std::optional<fs::path> folder = newest_checkpoint(folder_);
    if (!folder) return 0;
    const CheckpointState state = read_checkpoint_state(*folder);
    const at::Tensor weight = open_safetensors(*folder / "model.safetensors")->read("weight");
    EXPECT_TRUE(at::equal(weight, at::full({300}, static_cast<double>(state.step))));
    return state.step;
  }

  KeptCheckpoints kept_ = {.save_total_limit = 2};
  // In memory where there is such a place: thousands of flushes take their time on a disk.
  TemporaryFolder temporary_{fs::is_directory("/dev/shm") ? fs::path("/dev/shm") : fs::temp_directory_path()};
  fs::path folder_ = temporary_.path();
  std::string log_;
  LogSink previous_;
};

TEST_F(SaveFaults, KilledAtAnyPointTheNewestWholeOneIsFound) {
  struct Case {
    const char* name;
    std::vector<int64_t> before;
    int64_t step, old;  // what is saved, and what may still be the newest
  };
  for (const Case& c :
       {Case{"first", {}, 1, 0}, Case{"overwriting", {1, 2}, 2, 2}, Case{"rotating", {1, 2}, 3, 2}}) {
    int points = 0;
    for (int point = 1;; ++point) {
      start_over(c.before);
      const int status = save_in_child(c.step, fmt::format("sigkill@save:{}", point));
      if (WIFEXITED(status)) {
        EXPECT_EQ(WEXITSTATUS(status), 0);
        break;
      }
      ASSERT_EQ(WTERMSIG(status), SIGKILL);
      const int64_t found = newest_step();
      EXPECT_TRUE(found == c.step || found == c.old) << c.name << " point " << point << ": step " << found;
      EXPECT_EQ(log_, "") << "no broken checkpoint may be in sight";
      // The run goes on and saves again.
      EXPECT_EQ(save_in_child(c.step, ""), 0);
      EXPECT_EQ(newest_step(), c.step);
      for (const auto& entry : fs::directory_iterator(folder_ / "checkpoints"))
        EXPECT_EQ(entry.path().string().find(".tmp-"), std::string::npos) << entry.path();
      points = point;
    }
    EXPECT_GE(points, 20) << c.name;
    RecordProperty(c.name, points);
  }
}

// Three older ones: the best, one to be removed, and one that stays.
TEST_F(SaveFaults, KilledAtAnyPointTheBestOneStays) {
  kept_.save_best = true;
  for (int point = 1;; ++point) {
    start_over({1, 2, 3});
    const int status = save_in_child(4, fmt::format("sigkill@save:{}", point));
    if (WIFEXITED(status)) {
      EXPECT_GE(point, 20);
      break;
    }
    ASSERT_EQ(WTERMSIG(status), SIGKILL);
    const fs::path best = folder_ / "checkpoints" / "step-00000001";
    EXPECT_EQ(best_checkpoint(folder_), best) << point;
    EXPECT_NO_THROW(verify_checkpoint(best)) << point;
    EXPECT_EQ(read_file(folder_ / "best"), "step-00000001\n") << point;
    EXPECT_THAT(newest_step(), testing::AnyOf(3, 4)) << point;
    EXPECT_EQ(save_in_child(4, ""), 0);
    int count = 0;
    for (const auto& entry : fs::directory_iterator(folder_ / "checkpoints")) count += entry.is_directory();
    EXPECT_EQ(count, 3) << point;
    EXPECT_EQ(best_checkpoint(folder_), best) << point;
    EXPECT_EQ(newest_step(), 4) << point;
  }
}

TEST_F(SaveFaults, AFailingDiskIsSaidAndTheOldOneStays) {
  for (const auto& [kind, words] :
       {std::pair{"enospc", "No space left on device"}, std::pair{"eio", "Input/output error"}}) {
    for (int point = 1;; ++point) {
      start_over({1});
      const int status = save_in_child(2, fmt::format("{}@save:{}", kind, point));
      ASSERT_TRUE(WIFEXITED(status));
      if (WEXITSTATUS(status) == 0) {
        EXPECT_GE(point, 20);
        break;
      }
      EXPECT_THAT(read_file(folder_ / "error"), testing::HasSubstr(words)) << point;
      const int64_t found = newest_step();
      EXPECT_TRUE(found == 1 || found == 2) << point;
      EXPECT_EQ(log_, "");
    }
  }
}

TEST_F(SaveFaults, AThousandFlippedBitsAndAHundredCutsAreAllFound) {
  start_over({1, 2});
  const fs::path newest = folder_ / "checkpoints" / "step-00000002";
  std::vector<fs::path> files;
  uint64_t total = 0;
  for (const auto& entry : fs::directory_iterator(newest)) {
    files.push_back(entry.path());
    total += fs::file_size(entry.path());
  }
  std::sort(files.begin(), files.end());
  const auto each_place = [&](uint64_t count, auto damage) {
    for (uint64_t i = 0; i < count; ++i) {
      uint64_t place = i * total / count;
      size_t file = 0;
      while (place >= fs::file_size(files[file])) place -= fs::file_size(files[file++]);
      const std::string good = read_file(files[file]);
      std::string bad = good;
      damage(bad, place, i);
      write_file_atomic(files[file], bad);
      EXPECT_EQ(newest_step(), 1) << files[file] << " at " << place;
      write_file_atomic(files[file], good);
    }
  };
  each_place(1000, [](std::string& bytes, uint64_t place, uint64_t i) {
    bytes[place] = static_cast<char>(bytes[place] ^ (1 << i % 8));
  });
  each_place(100, [](std::string& bytes, uint64_t place, uint64_t) { bytes.resize(place); });
  EXPECT_EQ(newest_step(), 2);
}

TEST_F(SaveFaults, InTheBackgroundTheBytesAreTheSame) {
  at::Tensor weight = at::arange(300, at::kFloat);
  CheckpointShare one = share(1);
  one.masters = {{"weight", Master::of(weight)}};
  {
    CheckpointWriter now(folder_ / "now", {.save_total_limit = 2}, false, World::alone()),
        later(folder_ / "later", {.save_total_limit = 2}, true, World::alone());
    now.save(one);
    EXPECT_EQ(now.finish(), folder_ / "now" / "checkpoints" / "step-00000001");
    later.save(one);
    later.before_update(2);
    weight.zero_();
    EXPECT_EQ(later.finish(), folder_ / "later" / "checkpoints" / "step-00000001");
    EXPECT_EQ(later.finish(), std::nullopt);
  }
  for (const auto& entry : fs::directory_iterator(folder_ / "now/checkpoints/step-00000001"))
    EXPECT_EQ(read_file(entry.path()),
              read_file(folder_ / "later/checkpoints/step-00000001" / entry.path().filename()));
}

TEST(FaultPlan, WhatItCannotReadItRefuses) {
  for (const auto& [text, words] : {std::pair{"sigkill", "expected KIND@POINT:COUNT"},
                                    std::pair{"sigkil@save:1", "did you mean \"sigkill\""},
                                    std::pair{"sigkill@save:x", "expected a number"},
                                    std::pair{"sigkill@save:1,node=2", "unknown \"node=2\""}})
    EXPECT_THAT([&] { plan_faults(text); }, testing::ThrowsMessage<ConfigError>(testing::HasSubstr(words)));
}

TEST(FaultPlan, HappensAtItsCountOfItsRankAndAttempt) {
  plan_faults("nan@micro_batch:2,rank=1;nan@step:1,attempt=1");
  set_fault_rank(0, 0);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(pass_fault_point("micro_batch"), Fault::kNone);
  set_fault_rank(1, 0);
  EXPECT_EQ(pass_fault_point("micro_batch"), Fault::kNone);
  EXPECT_EQ(pass_fault_point("micro_batch"), Fault::kNan);
  EXPECT_EQ(pass_fault_point("micro_batch"), Fault::kNone);
  EXPECT_EQ(pass_fault_point("step"), Fault::kNone);
  set_fault_rank(1, 1);
  EXPECT_EQ(pass_fault_point("step"), Fault::kNan);
  plan_faults("");
}

}  // namespace
}  // namespace caldera
