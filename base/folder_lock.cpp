#include "base/folder_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/fault.h"
#include "base/files.h"
#include "base/host.h"
#include "base/json.h"
#include "base/log.h"
#include "base/strings.h"

namespace caldera {
namespace {

constexpr auto kStep = std::chrono::milliseconds(50), kSettling = std::chrono::milliseconds(100);

struct LockHolder {
  std::string host;
  int64_t pid = 0, started = 0;
  std::string since;
};

[[noreturn]] void fail_lock(std::string_view what, const fs::path& path) {
  throw Error(fmt::format("{}: cannot {}: {}", path.string(), what, std::strerror(errno)));
}

// When the process started, in clock ticks since the machine did: a later process may get the same number,
// not the same time. 0: cannot be known; none: it has ended, and only waits to be asked how.
std::optional<int64_t> start_of_process(int64_t pid) {
  std::string text;
  try {
    text = read_file(fmt::format("/proc/{}/stat", pid));
  } catch (const Error&) {
    return 0;
  }
  // PID (NAME) STATE ...: the name may hold anything. The time is field 22, the state field 3.
  const size_t end = text.rfind(") ");
  if (end == std::string::npos) return 0;
  const std::vector<std::string> fields = split(text.substr(end + 2), " ");
  if (fields[0] == "Z" || fields[0] == "X") return std::nullopt;
  return fields.size() > 19 ? std::atoll(fields[19].c_str()) : 0;
}

bool lives(const LockHolder& holder) {
  if (::kill(static_cast<pid_t>(holder.pid), 0) != 0 && errno == ESRCH) return false;
  const std::optional<int64_t> started = start_of_process(holder.pid);
  return started && (*started == 0 || *started == holder.started);
}

std::string line_of_this_process() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  std::array<char, 32> since{};
  std::strftime(since.data(), since.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return json_line({{"host", host_name()},
                    {"pid", ::getpid()},
                    {"started", start_of_process(::getpid()).value_or(0)},
                    {"since", since.data()}}) +
         "\n";
}

// "" where it is gone.
std::string text_of(const fs::path& file) {
  try {
    return read_file(file);
  } catch (const Error&) {
    return "";
  }
}

// Whom the file's text names; none where it is empty (the file was just made), or damaged.
std::optional<LockHolder> holder_in(const std::string& text) {
  try {
    const Json line = parse_json(split(text, "\n")[0], "a lock");
    return LockHolder{.host = line.at("host").get<std::string>(),
                      .pid = line.at("pid").get<int64_t>(),
                      .started = line.at("started").get<int64_t>(),
                      .since = line.at("since").get<std::string>()};
  } catch (const Error&) {
  } catch (const nlohmann::json::exception&) {
  }
  return std::nullopt;
}

void write_lock_line(int descriptor, const std::string& line, const fs::path& file) {
  // Shortened afterwards: whoever reads it meanwhile finds a whole first line.
  const ssize_t count = ::pwrite(descriptor, line.data(), line.size(), 0);
  if (count != std::ssize(line)) {
    if (count >= 0) errno = ENOSPC;
    fail_lock("write", file);
  }
  if (::ftruncate(descriptor, std::ssize(line)) != 0) fail_lock("write", file);
}

// True: locked. False: errno says why not.
bool do_flock(int descriptor) {
  if (const auto reason = pass_io_point("lock")) return errno = *reason, false;
  int result = 0;
  do result = ::flock(descriptor, LOCK_EX | LOCK_NB);
  while (result != 0 && errno == EINTR);
  return result == 0;
}

}  // namespace

FolderLock::FolderLock(const fs::path& folder, const std::string& what, int patience_s)
    : file_(folder / ".lock"), line_(line_of_this_process()) {
  std::error_code error;
  fs::create_directories(folder, error);
  CALDERA_CHECK(!error, Error, "{}: cannot create: {}", folder.string(), error.message());
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(patience_s);
  while (!take()) {
    if (std::chrono::steady_clock::now() >= deadline) throw ConfigError(refusal(folder.string(), what));
    std::this_thread::sleep_for(kStep);
  }
}

FolderLock::~FolderLock() {
  if (has_flock_) {
    // Not by closing alone, which would leave it to a child that was made by fork(). The file stays: one who
    // has opened it and tries again would lock what is no longer there.
    ::flock(descriptor_, LOCK_UN);
    ::close(descriptor_);
  } else if (text_of(file_) == line_) {
    std::error_code ignored;
    fs::remove(file_, ignored);
  }
}

// One try. False: another process is in the way.
bool FolderLock::take() {
  int descriptor = ::open(file_.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  const bool is_new = descriptor >= 0;
  if (!is_new && errno == EEXIST) descriptor = ::open(file_.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor < 0) {
    if (errno == ENOENT) return false;  // its holder has just removed it
    fail_lock("open", file_);
  }
  bool is_taken = false;
  try {
    if (has_flock_) {
      is_taken = do_flock(descriptor);
      constexpr std::array kNoFlock = {ENOLCK, EOPNOTSUPP, ENOSYS, EINVAL};
      if (!is_taken) has_flock_ = std::find(kNoFlock.begin(), kNoFlock.end(), errno) == kNoFlock.end();
      if (!is_taken && has_flock_ && errno != EWOULDBLOCK) fail_lock("lock", file_);
    }
    // Without flock() the file is its maker's, or whoever's comes when the maker has ended.
    if (!has_flock_) is_taken = is_new || replace_stale();
    if (has_flock_ ? is_taken : is_new) write_lock_line(descriptor, line_, file_);
  } catch (...) {
    ::close(descriptor);
    throw;
  }
  if (is_taken && has_flock_)
    descriptor_ = descriptor;
  else
    ::close(descriptor);
  return is_taken;
}

// Without flock(): puts a file of this process in the place of one whose process has ended. False: it has
// not, or another process was faster.
bool FolderLock::replace_stale() const {
  const std::string text = text_of(file_);
  const std::optional<LockHolder> holder = holder_in(text);
  if (!holder || holder->host != host_name() || lives(*holder)) return false;
  const fs::path temporary = fmt::format("{}.tmp-{}", file_.string(), ::getpid());
  const int descriptor = ::open(temporary.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor < 0) fail_lock("create", temporary);
  const ssize_t count = ::write(descriptor, line_.data(), line_.size());
  if (::close(descriptor) != 0 || count != std::ssize(line_)) fail_lock("write", temporary);
  if (text_of(file_) != text) return fs::remove(temporary), false;
  if (::rename(temporary.c_str(), file_.c_str()) != 0) fail_lock("replace", file_);
  // Of several who found it stale at the same moment, the last to replace it has it.
  std::this_thread::sleep_for(kSettling);
  if (text_of(file_) != line_) return false;
  log_info("{}: process {}, which has ended, had left it; the folder is taken over", file_.string(),
           holder->pid);
  return true;
}

// Why the folder cannot be had.
std::string FolderLock::refusal(const std::string& folder, const std::string& what) const {
  const std::optional<LockHolder> holder = holder_in(text_of(file_));
  const std::string who =
      holder
          ? fmt::format("process {} on host {} has been working in this folder since {}", holder->pid,
                        holder->host, holder->since)
          : fmt::format("another process is working in this folder ({} does not say which)", file_.string());
  const std::string advice = fmt::format("wait for it, stop it, or name another {}", what);
  if (has_flock_ || (holder && holder->host == host_name()))
    return fmt::format("{}: {}; {}", folder, who, advice);
  return fmt::format(
      "{}: {}, as far as can be told: flock is not supported here; {}; if that process is gone, remove {}",
      folder, who, advice, file_.string());
}

}  // namespace caldera
