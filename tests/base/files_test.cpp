#include "base/files.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <optional>
#include <thread>

#include "base/fault.h"
#include "base/hash.h"
#include "tests/support.h"

namespace caldera {
namespace {

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

}  // namespace
}  // namespace caldera
