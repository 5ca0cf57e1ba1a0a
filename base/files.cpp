#include "base/files.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/fault.h"
#include "base/headway.h"
#include "base/log.h"

namespace caldera {
namespace {

constexpr uint64_t kLongFile = 64 << 20;
constexpr size_t kBlockBytes = 4096, kPieceBytes = 8 << 20;

[[noreturn]] void fail(std::string_view what, const fs::path& path) {
  throw Error(fmt::format("{}: cannot {}: {}", path.string(), what, std::strerror(errno)));
}

// The system calls that can lose data, each a point where tests put faults.
ssize_t do_write(int descriptor, const void* bytes, size_t num_bytes) {
  if (const auto reason = pass_io_point("write")) return errno = *reason, -1;
  return ::write(descriptor, bytes, num_bytes);
}
int do_fsync(int descriptor) {
  if (const auto reason = pass_io_point("fsync")) return errno = *reason, -1;
  return ::fsync(descriptor);
}
int do_rename(const fs::path& from, const fs::path& to) {
  if (const auto reason = pass_io_point("rename")) return errno = *reason, -1;
  return ::rename(from.c_str(), to.c_str());
}
// Swaps two paths in one step. False where the file system cannot.
bool do_exchange(const fs::path& one, const fs::path& other) {
  if (const auto reason = pass_io_point("exchange")) return errno = *reason, false;
  return ::renameat2(AT_FDCWD, one.c_str(), AT_FDCWD, other.c_str(), RENAME_EXCHANGE) == 0;
}

void flush_path(const fs::path& path, int flags) {
  const int descriptor = ::open(path.c_str(), flags);
  if (descriptor < 0) fail("open for flushing", path);
  const int result = do_fsync(descriptor);
  ::close(descriptor);
  if (result != 0) fail("flush", path);
  note_headway();
}

void flush_folder(const fs::path& folder) {
  flush_path(folder.empty() ? fs::path(".") : folder, O_RDONLY | O_DIRECTORY);
}

// Everything below the folder to disk: file by file, or, for thousands of small files (pictures), the file
// system at once.
void flush_tree(const fs::path& folder) {
  constexpr size_t kMany = 100;
  std::vector<fs::path> files, folders = {folder};
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    (entry.is_directory() ? folders : files).push_back(entry.path());
  if (files.size() > kMany) {
    const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY);
    if (descriptor < 0) fail("open for flushing", folder);
    const int result = ::syncfs(descriptor);
    ::close(descriptor);
    if (result != 0) fail("flush", folder);
    return note_headway();
  }
  for (const fs::path& file : files) flush_path(file, O_RDONLY);
  for (const fs::path& path : folders) flush_folder(path);
}

// As fs::remove_all(), with headway: the blocks of a long file take their time to be given back.
void remove_tree(const fs::path& path) {
  if (fs::is_directory(fs::symlink_status(path))) {
    const std::vector<fs::path> inside(fs::directory_iterator(path), {});
    for (const fs::path& entry : inside) remove_tree(entry);
  }
  fs::remove(path);
  note_headway();
}

constexpr std::string_view kLeftover = ".tmp-", kReplaced = ".tmp-old-";

// A folder was to be replaced in two renames, and a crash came between them: its place is empty, beside it lie
// the old folder and the new one. The old one goes back; of several, the youngest.
void restore_replaced(std::vector<fs::path> old_folders) {
  std::sort(old_folders.begin(), old_folders.end(), [](const fs::path& one, const fs::path& other) {
    return fs::last_write_time(one) > fs::last_write_time(other);
  });
  for (const fs::path& old : old_folders) {
    const std::string name = old.string();
    const fs::path place = name.substr(0, name.rfind(kReplaced));
    if (fs::exists(place)) continue;
    if (do_rename(old, place) != 0) fail("put back in place", place);
    flush_folder(place.parent_path());
    log_info("{}: put back, after a crash while another was to replace it", place.string());
  }
}

fs::path temporary_name(const fs::path& path) { return fmt::format("{}.tmp-{}", path.string(), ::getpid()); }

}  // namespace

std::string read_file(const fs::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail("open", path);
  // The size is a guess: a pipe has none. One byte more shows the end without growing.
  constexpr size_t kUnknownBytes = 1 << 16;
  struct stat status {};
  const bool is_known = ::fstat(descriptor, &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0;
  std::string bytes(is_known ? static_cast<size_t>(status.st_size) + 1 : kUnknownBytes, '\0');
  size_t done = 0;
  ssize_t count = 0;
  do {
    if (done == bytes.size()) bytes.resize(2 * bytes.size());
    count = ::read(descriptor, bytes.data() + done, bytes.size() - done);
    if (count > 0) done += static_cast<size_t>(count);
    note_headway();
  } while (count > 0 || (count < 0 && errno == EINTR));
  const int reason = errno;
  ::close(descriptor);
  errno = reason;
  if (count < 0) fail("read", path);
  bytes.resize(done);
  return bytes;
}

AtomicFile::AtomicFile(fs::path path, uint64_t num_bytes) : path_(std::move(path)), piece_(nullptr, std::free) {
  std::error_code ignored;
  // A link stays one: what it leads to is replaced. A terminal, a pipe or /dev/null is written to as it is.
  if (fs::is_symlink(path_, ignored) && fs::exists(path_, ignored)) path_ = fs::canonical(path_);
  const fs::file_status status = fs::status(path_, ignored);
  is_stream_ = fs::exists(status) && !fs::is_regular_file(status) && !fs::is_directory(status);
  if (is_stream_) {
    descriptor_ = ::open(path_.c_str(), O_WRONLY | O_CLOEXEC);
    if (descriptor_ < 0) fail("open", path_);
    return;
  }
  temporary_ = temporary_name(path_);
  descriptor_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail("create", temporary_);
  if (num_bytes >= kLongFile && set_direct(true))
    piece_.reset(static_cast<char*>(std::aligned_alloc(kBlockBytes, kPieceBytes)));
  if (is_direct_ && !piece_) set_direct(false);
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  if (!is_stream_) ::unlink(temporary_.c_str());
}

bool AtomicFile::set_direct(bool on) {
  const int flags = ::fcntl(descriptor_, F_GETFL);
  const bool is_set =
      flags >= 0 && ::fcntl(descriptor_, F_SETFL, on ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
  if (is_set) is_direct_ = on;
  return is_set;
}

void AtomicFile::write_out(const char* bytes, size_t num_bytes) {
  while (num_bytes > 0) {
    const ssize_t count = do_write(descriptor_, bytes, num_bytes);
    if (count < 0) {
      const int reason = errno;
      if (reason == EINTR) continue;
      // A file system that has no such way after all, other blocks, or part of one written before the disk was full.
      if ((reason == EINVAL || reason == EOPNOTSUPP) && is_direct_ && set_direct(false)) continue;
      errno = reason;
      fail("write", path_);
    }
    bytes += count;
    num_bytes -= static_cast<size_t>(count);
    note_headway();
  }
}

void AtomicFile::write(const void* bytes, size_t num_bytes) {
  hasher_.add(bytes, num_bytes);
  const char* next = static_cast<const char*>(bytes);
  if (!piece_) return write_out(next, num_bytes);
  while (num_bytes > 0) {
    const size_t count = std::min(num_bytes, kPieceBytes - num_in_piece_);
    std::memcpy(piece_.get() + num_in_piece_, next, count);
    next += count;
    num_bytes -= count;
    num_in_piece_ += count;
    if (num_in_piece_ < kPieceBytes) break;
    write_out(piece_.get(), kPieceBytes);
    num_in_piece_ = 0;
  }
}

void AtomicFile::commit() {
  if (is_direct_ && !set_direct(false)) fail("write", path_);  // the end is no whole block
  write_out(piece_.get(), std::exchange(num_in_piece_, 0));
  if (is_stream_) {
    if (::close(std::exchange(descriptor_, -1)) != 0) fail("write", path_);
    return;
  }
  if (do_fsync(descriptor_) != 0) fail("flush", path_);
  note_headway();
  const int result = ::close(descriptor_);
  descriptor_ = -1;
  if (result != 0 || do_rename(temporary_, path_) != 0) {
    const int reason = errno;
    ::unlink(temporary_.c_str());
    errno = reason;
    fail("put in place", path_);
  }
  flush_folder(path_.parent_path());
}

void write_file_atomic(const fs::path& path, std::string_view bytes) {
  AtomicFile file(path);
  file.write(bytes);
  file.commit();
}

void write_folder_atomic(const fs::path& named, const std::function<void(const fs::path&)>& fill) {
  const fs::path path = named.has_filename() ? named : named.parent_path();  // beside "out/" is not in it
  const fs::path temporary = temporary_name(path);
  remove_tree(temporary);
  fs::create_directories(temporary);
  try {
    fill(temporary);
    flush_tree(temporary);
    if (!fs::exists(path)) {
      if (do_rename(temporary, path) != 0) fail("put in place", path);
    } else if (!do_exchange(temporary, path)) {
      // Where the file system cannot swap: a folder cannot replace a full one, so it takes two renames.
      // Between them `path` is absent, and remove_leftovers() puts the old one back.
      if (errno != EINVAL && errno != ENOSYS) fail("put in place", path);
      const fs::path old = fmt::format("{}{}{}", path.string(), kReplaced, ::getpid());
      if (do_rename(path, old) != 0) fail("put in place", path);
      if (do_rename(temporary, path) != 0) {
        const int reason = errno;
        ::rename(old.c_str(), path.c_str());
        errno = reason;
        fail("put in place", path);
      }
      // Half removed under its old name, it would be put back once `path` is gone.
      if (do_rename(old, temporary) != 0) fail("remove", old);
    }
    flush_folder(path.parent_path());
    remove_tree(temporary);  // what was there before, if anything
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(temporary, ignored);
    throw;
  }
}

fs::path old_name(const fs::path& path) {
  for (int number = 1;; ++number)
    if (fs::path name = fmt::format("{}.old-{}", path.string(), number); !fs::exists(name)) return name;
}

void remove_folder(const fs::path& path) {
  const fs::path temporary = fmt::format("{}.tmp-gone-{}", path.string(), ::getpid());
  if (do_rename(path, temporary) != 0) fail("remove", path);
  remove_tree(temporary);
}

void remove_leftovers(const fs::path& folder) {
  if (!fs::is_directory(folder)) return;
  const auto all = [&](std::string_view mark) {
    std::vector<fs::path> found(fs::directory_iterator(folder), {});
    std::erase_if(found, [&](const fs::path& path) {
      return path.filename().string().find(mark) == std::string::npos;
    });
    return found;
  };
  restore_replaced(all(kReplaced));
  for (const fs::path& path : all(kLeftover)) remove_tree(path);
}

MappedFile::MappedFile(const fs::path& path) : path_(path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) fail("open", path);
  struct stat status {};
  if (::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    ::close(descriptor);
    throw Error(fmt::format("{}: cannot map: not a regular file", path.string()));
  }
  size_ = static_cast<size_t>(status.st_size);
  if (size_ > 0) {
    data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (data_ == MAP_FAILED) {
      ::close(descriptor);
      data_ = nullptr;
      fail("map", path);
    }
  }
  ::close(descriptor);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

}  // namespace caldera
