#include "base/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <thread>

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
