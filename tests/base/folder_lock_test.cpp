// One process at a time in a folder: with flock(), and on file systems that have none.
#include "base/folder_lock.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <functional>

#include "base/fault.h"
#include "base/json.h"
#include "base/log.h"
#include "tests/support.h"

namespace caldera {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;
using ::testing::Not;

constexpr const char* kWithoutFlock = "enolck@lock:1";

class FolderLocks : public testing::Test {
 protected:
  void SetUp() override {
    previous_ = set_log_sink([this](LogLevel, const std::string& line) { log_ += line + "\n"; });
  }
  void TearDown() override {
    plan_faults("");
    set_log_sink(previous_);
    for (const pid_t child : children_) {
      ::kill(child, SIGKILL);
      ::waitpid(child, nullptr, 0);
    }
  }
  // A process that holds the lock until it is killed. Returns when it has it.
  pid_t hold_in_child(const std::string& faults) {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0) throw Error("pipe");
    const pid_t child = ::fork();
    if (child == 0) {
      ::close(ends[0]);
      plan_faults(faults);
      try {
        const FolderLock lock(folder_, "output");
        if (::write(ends[1], "x", 1) == 1)
          for (;;) ::pause();
      } catch (const std::exception&) {
      }
      ::_exit(1);
    }
    children_.push_back(child);
    ::close(ends[1]);
    char byte = 0;
    EXPECT_EQ(::read(ends[0], &byte, 1), 1) << "the child did not get the lock";
    ::close(ends[0]);
    return child;
  }
  std::string refusal(const std::string& faults) {
    plan_faults(faults);
    const std::string error = error_of<ConfigError>([&] { FolderLock(folder_, "output"); });
    plan_faults("");
    return error;
  }
  Json in_file() const { return read_json(folder_ / ".lock"); }
  void write_lock(const std::string& name, const Json& value) {
    Json line = in_file();
    line[name] = value;
    write_file_atomic(folder_ / ".lock", json_line(line) + "\n");
  }

  TemporaryFolder temporary_;
  fs::path folder_ = temporary_.path() / "a" / "run";
  std::vector<pid_t> children_;
  std::string log_;
  LogSink previous_;
};

TEST_F(FolderLocks, ItIsHeldForAsLongAsItLives) {
  {
    const FolderLock lock(folder_, "output");
    EXPECT_EQ(in_file().at("pid"), ::getpid());
    EXPECT_GT(in_file().at("started"), 0);
    EXPECT_THAT(refusal(""),
                MatchesRegex(fmt::format("{}: process {} on host .+ has been working in this folder since "
                                         "....-..-..T..:..:..Z; wait for it, stop it, or name another output",
                                         folder_.string(), ::getpid())));
  }
  EXPECT_EQ(refusal(""), "accepted");
  EXPECT_EQ(log_, "");
}

TEST_F(FolderLocks, AnotherProcessHoldsItUntilItIsKilled) {
  const pid_t child = hold_in_child("");
  EXPECT_EQ(in_file().at("pid"), child);
  EXPECT_THAT(refusal(""), HasSubstr(fmt::format("process {} on host", child)));
  ::kill(child, SIGKILL);
  EXPECT_EQ(refusal(""), "accepted");  // it may still be ending: that is waited for
}

TEST_F(FolderLocks, WhatALateHolderSaidOfItselfMeansNothing) {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string(1000, 'x'),
        std::string(R"({"host":"elsewhere","pid":1,"started":1,"since":"long ago"})")}) {
    fs::create_directories(folder_);
    write_file_atomic(folder_ / ".lock", text);
    const FolderLock lock(folder_, "output");
    EXPECT_EQ(in_file().at("pid"), ::getpid()) << text;  // nothing else in it, or it were no JSON
  }
}

TEST_F(FolderLocks, WhatCannotBeLockedIsNamed) {
  const fs::path file = temporary_.write("file", "");
  EXPECT_THAT(error_of<Error>([&] { FolderLock(file / "run", "output"); }),
              HasSubstr("run: cannot create: Not a directory"));
  fs::create_directories(folder_ / ".lock");
  EXPECT_THAT(error_of<Error>([&] { FolderLock(folder_, "output"); }),
              HasSubstr(".lock: cannot open: Is a directory"));
  fs::remove(folder_ / ".lock");
  plan_faults("eio@lock:1");
  EXPECT_THAT(error_of<Error>([&] { FolderLock(folder_, "output"); }),
              HasSubstr(".lock: cannot lock: Input/output error"));
}

TEST_F(FolderLocks, WithoutFlockTheFileIsTheLock) {
  {
    plan_faults(kWithoutFlock);
    const FolderLock lock(folder_, "output");
    EXPECT_EQ(in_file().at("pid"), ::getpid());
    EXPECT_THAT(refusal(kWithoutFlock), HasSubstr(fmt::format("process {} on host", ::getpid())));
  }
  EXPECT_FALSE(fs::exists(folder_ / ".lock"));
  EXPECT_EQ(refusal(kWithoutFlock), "accepted");
  EXPECT_EQ(log_, "");
}

TEST_F(FolderLocks, WithoutFlockWhatAKilledProcessLeftIsReplaced) {
  const pid_t child = hold_in_child(kWithoutFlock);
  EXPECT_THAT(refusal(kWithoutFlock),
              AllOf(HasSubstr(fmt::format("process {} on host", child)), Not(HasSubstr("remove"))));
  ::kill(child, SIGKILL);  // and not asked how it ended: it stays in the list of processes
  {
    plan_faults(kWithoutFlock);
    const FolderLock lock(folder_, "output");
    EXPECT_EQ(in_file().at("pid"), ::getpid());
    EXPECT_THAT(log_, HasSubstr(fmt::format(".lock: process {}, which has ended, had left it", child)));
  }
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST_F(FolderLocks, WithoutFlockALaterProcessOfTheSameNumberIsNotTheHolder) {
  const pid_t child = hold_in_child(kWithoutFlock);
  write_lock("started", in_file().at("started").get<int64_t>() - 1);
  EXPECT_EQ(refusal(kWithoutFlock), "accepted");
  EXPECT_THAT(log_, HasSubstr(fmt::format("process {}, which has ended", child)));
}

TEST_F(FolderLocks, WithoutFlockAnotherHostIsBelieved) {
  hold_in_child(kWithoutFlock);
  write_lock("host", "node7");
  write_lock("pid", 1234);
  write_lock("since", "2026-12-01T10:00:00Z");
  EXPECT_EQ(
      refusal(kWithoutFlock),
      fmt::format(
          "{0}: process 1234 on host node7 has been working in this folder since 2026-12-01T10:00:00Z, as "
          "far as "
          "can be told: flock is not supported here; wait for it, stop it, or name another output; if that "
          "process is gone, remove {0}/.lock",
          folder_.string()));
  write_file_atomic(folder_ / ".lock", "");
  EXPECT_THAT(refusal(kWithoutFlock),
              AllOf(HasSubstr("does not say which"), HasSubstr("remove " + (folder_ / ".lock").string())));
}

}  // namespace
}  // namespace caldera
