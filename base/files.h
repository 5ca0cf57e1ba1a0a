// Files that are never half-written: everything is written beside its place, flushed, then renamed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/hash.h"

namespace caldera {

namespace fs = std::filesystem;

// The whole file, up to its end: also of a pipe, whose size is not known before. Throws Error naming the file
// and the system's reason.
std::string read_file(const fs::path& path);

// A file under construction: bytes go to "PATH.tmp-PID", commit() flushes it to disk, renames it to PATH and
// flushes the folder. Destroyed without commit(), it leaves nothing. Every failing system call throws Error
// with the path. A link's target is replaced, not the link; what is no file (a pipe, /dev/stdout) is written to as it is. Long
// files go to the disk past the page cache, where the file system has a way: a checkpoint would
// push the pictures out of it, and on a virtual machine its fresh pages cost more than the disk.
class AtomicFile {
 public:
  // `num_bytes`: how long it will be, as far as that is known.
  explicit AtomicFile(fs::path path, uint64_t num_bytes = 0);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(const void* bytes, size_t num_bytes);
  void write(std::string_view text) { write(text.data(), text.size()); }
  void commit();
  // XXH3-128 of what was written, as hash_file().
  std::string hash() const { return hasher_.hex(); }

 private:
  void write_out(const char* bytes, size_t num_bytes);
  bool set_direct(bool on);

  fs::path path_, temporary_;
  int descriptor_ = -1;
  bool is_stream_ = false;  // no file that could be replaced
  Hasher hasher_;
  // Past the cache go whole pieces of memory alone.
  bool is_direct_ = false;
  std::unique_ptr<char, void (*)(void*)> piece_;
  size_t num_in_piece_ = 0;
};

void write_file_atomic(const fs::path& path, std::string_view bytes);

// Builds a folder beside its place: fill(temporary folder), flush every file in it, rename to `path`
// (replacing what is there), flush the parent. After a crash `path` is the old folder, the new one, or
// absent; never a mixture. Where the file system cannot swap two folders it may be absent though there was an
// old one: remove_leftovers() of the parent puts that back. A final '/' changes nothing.
void write_folder_atomic(const fs::path& path, const std::function<void(const fs::path&)>& fill);

// Where something may be put aside: the first of PATH.old-1, PATH.old-2, ... that is not there.
fs::path old_name(const fs::path& path);

// Removes a folder with all that is in it; killed in between, it is whole or gone.
void remove_folder(const fs::path& path);

// Removes what interrupted writes left in a folder ("*.tmp-*"). Before that, it puts back a folder that was
// moved away for another that never came ("NAME.tmp-old-PID" where there is no NAME), and logs which.
void remove_leftovers(const fs::path& folder);

// A read-only memory map of a whole file; empty files map to an empty span.
class MappedFile {
 public:
  explicit MappedFile(const fs::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace caldera
