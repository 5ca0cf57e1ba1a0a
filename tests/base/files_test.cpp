#include "base/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <optional>
#include <thread>

#include "base/fault.h"
#include "base/hash.h"
#include "base/log.h"
#include "tests/support.h"

namespace caldera {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(Files, AFileIsReadToItsEnd) {
  const TemporaryFolder folder;
  for (const size_t size : {0, 1, 65535, 65536, 200000}) {
    const std::string bytes(size, 'x');
    EXPECT_EQ(read_file(folder.write("file", bytes)), bytes) << size;
  }
  EXPECT_NE(read_file("/proc/self/stat"), "");  // says it is empty
  EXPECT_THAT(error_of<Error>([&] { read_file(folder.path()); }), HasSubstr("cannot read: Is a directory"));
  EXPECT_THAT(error_of<Error>([&] { read_file(folder.path() / "none"); }),
              HasSubstr("none: cannot open: No such file"));
}

TEST(Files, ALinkStaysOneAndWhatIsNoFileIsWrittenTo) {
  const TemporaryFolder folder;
  folder.write("target", "old");
  fs::create_symlink("target", folder.path() / "link");
  write_file_atomic(folder.path() / "link", "new");
  EXPECT_TRUE(fs::is_symlink(folder.path() / "link"));
  EXPECT_EQ(read_file(folder.path() / "target"), "new");

  const fs::path pipe = folder.path() / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  std::string got;
  std::thread reader([&] { got = read_file(pipe); });
  write_file_atomic(pipe, "through the pipe");
  reader.join();
  EXPECT_EQ(got, "through the pipe");
  EXPECT_TRUE(fs::is_fifo(pipe));
}

TEST(Files, APipeIsReadToItsEnd) {
  std::string bytes;
  for (int i = 0; i < 30000; ++i) bytes += fmt::format("{} ", i);
  std::array<int, 2> ends{};
  ASSERT_EQ(::pipe2(ends.data(), O_CLOEXEC), 0);
  std::thread writer([&] {
    for (size_t done = 0; done < bytes.size();) {
      const ssize_t count = ::write(ends[1], bytes.data() + done, bytes.size() - done);
      if (count <= 0) break;
      done += static_cast<size_t>(count);
    }
    ::close(ends[1]);
  });
  EXPECT_EQ(read_file(fmt::format("/dev/fd/{}", ends[0])), bytes);
  writer.join();
  ::close(ends[0]);
}

// On a disk they go past the page cache; in memory, before Linux 6.6, they cannot.
class LongFiles : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    constexpr uint64_t kNeeded = 200 << 20;
    std::error_code none;
    if (fs::space(GetParam(), none).available < kNeeded || none) GTEST_SKIP() << GetParam() << " has no room";
    folder_.emplace(GetParam());
    for (size_t i = 0; bytes_.size() < (65 << 20); ++i) bytes_ += fmt::format("{} ", i);
  }
  void write(size_t step) const {
    AtomicFile file(path(), bytes_.size());
    for (size_t at = 0; at < bytes_.size(); at += step) file.write(std::string_view(bytes_).substr(at, step));
    const std::string hash = file.hash();
    file.commit();
    EXPECT_EQ(hash, hash_file(path()));
  }
  fs::path path() const { return folder_->path() / "long"; }
  size_t num_files() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(folder_->path()), {}));
  }

  std::optional<TemporaryFolder> folder_;
  std::string bytes_;
};

TEST_P(LongFiles, HoldWhatWasWritten) {
  for (const size_t step : {size_t{1000003}, size_t{20} << 20, bytes_.size()}) {
    write(step);
    EXPECT_TRUE(read_file(path()) == bytes_) << step;
  }
  EXPECT_EQ(num_files(), 1u);
}

TEST_P(LongFiles, SayWhyTheyCannotBeWrittenAndLeaveNothing) {
  for (int point = 1;; ++point) {
    plan_faults(fmt::format("enospc@write:{}", point));
    const std::string error = error_of<Error>([&] { write(bytes_.size()); });
    plan_faults("");
    if (error == "accepted") {
      EXPECT_GE(point, 9);
      break;
    }
    EXPECT_THAT(error, HasSubstr("long: cannot write: No space left on device"));
    EXPECT_EQ(num_files(), 0u);
  }
  // A limit within a block: the part before it is no whole one.
  fs::remove(path());
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit limit{(20 << 20) + 100, before.rlim_max};
  ::setrlimit(RLIMIT_FSIZE, &limit);
  const std::string error = error_of<Error>([&] { write(bytes_.size()); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_THAT(error, HasSubstr("long: cannot write: File too large"));
  EXPECT_EQ(num_files(), 0u);
}

INSTANTIATE_TEST_SUITE_P(, LongFiles, ::testing::Values("/dev/shm", "/var/tmp"));

TEST(Files, AFoldersNameMayEndInASlash) {
  const TemporaryFolder folder;
  const std::string named = (folder.path() / "out").string() + "/";
  for (const char* text : {"first", "second"}) {
    write_folder_atomic(named, [&](const fs::path& inside) { write_file_atomic(inside / "file", text); });
    EXPECT_EQ(read_file(folder.path() / "out/file"), text);
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path() / "out"), {}), 1);
}

// A file system that cannot swap two folders; the process is killed, or the disk fails, at each rename.
class ReplacedFolders : public ::testing::Test {
 protected:
  void SetUp() override {
    previous_ = set_log_sink([this](LogLevel, const std::string& line) { log_ += line + "\n"; });
    fill("old");
  }
  void TearDown() override { set_log_sink(previous_); }
  void fill(const std::string& text) const {
    write_folder_atomic(out_, [&](const fs::path& inside) {
      for (const char* name : {"a", "b"}) write_file_atomic(inside / name, text);
    });
  }
  // Replaces the folder in a process of its own. Returns how that ended, as waitpid gives it.
  int replace_in_child(const std::string& fault) const {
    const pid_t child = ::fork();
    if (child == 0) {
      plan_faults("enosys@exchange:1;" + fault);
      try {
        fill("new");
      } catch (const Error&) {
        ::_exit(1);
      }
      ::_exit(0);
    }
    int status = -1;
    ::waitpid(child, &status, 0);
    return status;
  }
  // What the whole folder holds; "none" without one.
  std::string found() const {
    if (!fs::exists(out_)) return "none";
    const std::string text = read_file(out_ / "a");
    return read_file(out_ / "b") == text ? text : "a mixture";
  }
  size_t num_entries() const {
    return static_cast<size_t>(std::distance(fs::directory_iterator(folder_.path()), {}));
  }

  TemporaryFolder folder_;
  fs::path out_ = folder_.path() / "out";
  std::string log_;
  LogSink previous_;
};

TEST_F(ReplacedFolders, KilledAtAnyRenameTheOldOrTheNewOneIsThereAfterTidying) {
  std::vector<std::string> before, after;
  for (int point = 1;; ++point) {
    fill("old");
    const int status = replace_in_child(fmt::format("sigkill@rename:{}", point));
    if (WIFEXITED(status)) {
      EXPECT_EQ(WEXITSTATUS(status), 0);
      EXPECT_EQ(found(), "new");
      EXPECT_EQ(num_entries(), 1u);
      break;
    }
    ASSERT_EQ(WTERMSIG(status), SIGKILL);
    before.push_back(found());
    log_.clear();
    remove_leftovers(folder_.path());
    after.push_back(found());
    EXPECT_EQ(num_entries(), 1u) << point;
    const std::string line = out_.string() + ": put back, after a crash while another was to replace it\n";
    EXPECT_EQ(log_, before.back() == "none" ? line : "") << point;
  }
  // Two files, then the old one out of the way, the new one in, the old one to be removed.
  EXPECT_THAT(before, ElementsAre("old", "old", "old", "none", "new"));
  EXPECT_THAT(after, ElementsAre("old", "old", "old", "old", "new"));
}

TEST_F(ReplacedFolders, OnADiskThatFailsTheOldOneStays) {
  for (int point = 1; point <= 4; ++point) {
    EXPECT_EQ(replace_in_child(fmt::format("eio@rename:{}", point)), 1 << 8) << point;
    EXPECT_EQ(found(), "old") << point;
    EXPECT_EQ(num_entries(), 1u) << point;
  }
}

TEST_F(ReplacedFolders, WhatWasToBeRemovedStaysRemoved) {
  const fs::path gone = out_.string() + ".tmp-gone-7", made = out_.string() + ".tmp-8";
  fs::rename(out_, gone);
  fs::create_directories(made / "inside");
  remove_leftovers(folder_.path());
  EXPECT_EQ(num_entries(), 0u);
  EXPECT_EQ(log_, "");
}

TEST_F(ReplacedFolders, OfSeveralTheYoungestIsPutBack) {
  const fs::path early = out_.string() + ".tmp-old-7", late = out_.string() + ".tmp-old-8";
  fs::rename(out_, early);
  fill("newer");
  fs::rename(out_, late);
  fs::last_write_time(early, fs::last_write_time(late) - std::chrono::hours(1));
  remove_leftovers(folder_.path());
  EXPECT_EQ(found(), "newer");
  EXPECT_EQ(num_entries(), 1u);
}

}  // namespace
}  // namespace caldera
