#include "base/headway.h"

#include <gtest/gtest.h>

#include <functional>
#include <thread>

#include "base/hash.h"
#include "tests/support.h"

namespace caldera {
namespace {

TEST(Headway, FilesCountItUpInAScopeOfTheSameThread) {
  const TemporaryFolder folder;
  const fs::path file = folder.path() / "file", tree = folder.path() / "tree";
  const std::string bytes(3 << 20, 'x');
  std::atomic<int64_t> counter = 0;
  // In this order each finds what it works on.
  const std::vector<std::pair<const char*, std::function<void()>>> all_work = {
      {"write", [&] { write_file_atomic(file, bytes); }},
      {"read", [&] { read_file(file); }},
      {"hash", [&] { hash_file(file); }},
      {"folder",
       [&] { write_folder_atomic(tree, [&](const fs::path& out) { fs::copy_file(file, out / "a"); }); }},
      {"remove", [&] { remove_folder(tree); }}};
  for (const auto& [name, work] : all_work) {
    const HeadwayScope scope(counter);
    const int64_t before = counter;
    work();
    EXPECT_GT(counter, before) << name;
  }
  const int64_t before = counter;
  for (const auto& [name, work] : all_work) work();
  EXPECT_EQ(counter, before) << "outside of a scope";
  const HeadwayScope scope(counter);
  std::thread([&] {
    for (const auto& [name, work] : all_work) work();
  }).join();
  EXPECT_EQ(counter, before) << "on another thread";
}

TEST(Headway, EachBlockOfALongFileCounts) {
  const TemporaryFolder folder;
  const fs::path file = folder.write("file", std::string(5 << 20, 'x'));
  std::atomic<int64_t> counter = 0;
  const HeadwayScope scope(counter);
  hash_file(file);
  EXPECT_EQ(counter, 5);
}

TEST(Headway, TheInnerScopeCountsThenTheOuterOneAgain) {
  std::atomic<int64_t> outer = 0, inner = 0;
  note_headway();
  EXPECT_EQ(headway_counter(), nullptr);
  {
    const HeadwayScope scope(outer);
    note_headway();
    {
      const HeadwayScope inner_scope(inner);
      note_headway();
      note_headway();
    }
    EXPECT_EQ(headway_counter(), &outer);
    note_headway();
  }
  note_headway();
  EXPECT_EQ(outer, 2);
  EXPECT_EQ(inner, 2);
}

}  // namespace
}  // namespace caldera
