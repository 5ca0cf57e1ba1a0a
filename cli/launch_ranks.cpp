#include "cli/launch_ranks.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "base/files.h"

extern char** environ;

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;
// How long the others may take to end by themselves once a rank has failed; they look for the cause
// meanwhile.
constexpr auto kGrace = std::chrono::seconds(6);

// Code 5: another rank or the connection is to blame.
int victims_code() { return DistributedError("").exit_code(); }

}  // namespace

void RankProcess::take(std::string_view text) {
  log << text << std::flush;
  if (is_on_terminal) {
    std::fwrite(text.data(), 1, text.size(), stderr);
    std::fflush(stderr);
  }
  for (const char c : text) {
    if (c != '\n') {
      line.push_back(c);
      continue;
    }
    constexpr size_t kMost = 4000;
    if (line.starts_with("error: "))
      error = line.substr(7);
    else if (!error.empty() && error.size() < kMost)
      error += "\n" + line;
    line.clear();
  }
}

int RankProcess::exit_code() const {
  const int ended = status.value_or(0);
  return WIFEXITED(ended) ? WEXITSTATUS(ended) : victims_code();
}

Attempt::Attempt(const RankProcesses& all) : ranks_(static_cast<size_t>(all.count)) {
  for (size_t i = 0; i < ranks_.size(); ++i) {
    RankProcess& rank = ranks_[i];
    rank.rank = all.first_rank + static_cast<int>(i);
    rank.is_on_terminal = i == 0;
    const fs::path path = all.logs / fmt::format("rank-{}.log", rank.rank);
    rank.log.open(path, std::ios::app);
    CALDERA_CHECK(rank.log.good(), Error, "{}: cannot open for appending", path.string());
    start(rank, all);
  }
}

Attempt::~Attempt() {
  send(SIGKILL);
  for (RankProcess& rank : ranks_) {
    if (rank.pid > 0 && !rank.status) ::waitpid(rank.pid, nullptr, 0);
    if (rank.pipe >= 0) ::close(rank.pipe);
  }
}

void Attempt::start(RankProcess& rank, const RankProcesses& all) {
  std::map<std::string, std::string> variables;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable;
    const size_t end = text.find('=');
    if (end != std::string::npos) variables[text.substr(0, end)] = text.substr(end + 1);
  }
  // The ranks share the machine's cores, and threads that wait must not spin on them.
  const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / all.count);
  variables.try_emplace("OMP_NUM_THREADS", std::to_string(threads));
  variables.try_emplace("OMP_WAIT_POLICY", "passive");
  for (const auto& [name, value] : all.variables) variables[name] = value;
  variables["RANK"] = std::to_string(rank.rank);
  variables["LOCAL_RANK"] = std::to_string(rank.rank - all.first_rank);
  variables["LOCAL_WORLD_SIZE"] = std::to_string(all.count);
  std::vector<std::string> settings, words = {"caldera"};
  for (const auto& [name, value] : variables) settings.push_back(name + "=" + value);
  words.insert(words.end(), all.command.begin(), all.command.end());
  const auto pointers = [](std::vector<std::string>& texts) {
    std::vector<char*> list;
    for (std::string& text : texts) list.push_back(text.data());
    list.push_back(nullptr);
    return list;
  };
  const std::vector<char*> environment = pointers(settings), arguments = pointers(words);

  std::array<int, 2> ends;
  CALDERA_CHECK(::pipe2(ends.data(), O_CLOEXEC) == 0, Error, "cannot make a pipe: {}", std::strerror(errno));
  const pid_t parent = ::getpid();
  rank.pid = ::fork();
  CALDERA_CHECK(rank.pid >= 0, Error, "cannot start a process: {}", std::strerror(errno));
  if (rank.pid == 0) {
    // A process group of its own: the terminal's Ctrl-C reaches the launcher, which passes it on once. If the
    // launcher dies, the rank saves and ends.
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (::getppid() != parent) ::_exit(5);
    ::dup2(ends[1], STDOUT_FILENO);
    ::dup2(ends[1], STDERR_FILENO);
    ::execve("/proc/self/exe", arguments.data(), environment.data());
    ::_exit(127);
  }
  ::close(ends[1]);
  rank.pipe = ends[0];
}

void Attempt::read_pipes(int timeout_ms) {
  std::vector<pollfd> polled;
  std::vector<RankProcess*> whose;
  for (RankProcess& rank : ranks_) {
    if (rank.pipe < 0) continue;
    polled.push_back({.fd = rank.pipe, .events = POLLIN, .revents = 0});
    whose.push_back(&rank);
  }
  if (::poll(polled.data(), polled.size(), timeout_ms) <= 0) return;
  for (size_t i = 0; i < polled.size(); ++i) {
    if (polled[i].revents == 0) continue;
    std::array<char, 4096> buffer;
    const ssize_t count = ::read(polled[i].fd, buffer.data(), buffer.size());
    if (count > 0) {
      whose[i]->take({buffer.data(), static_cast<size_t>(count)});
    } else if (count == 0 || errno != EINTR) {
      ::close(whose[i]->pipe);
      whose[i]->pipe = -1;
    }
  }
}

void Attempt::reap() {
  for (size_t i = 0; i < ranks_.size(); ++i) {
    int status = 0;
    if (ranks_[i].status || ::waitpid(ranks_[i].pid, &status, WNOHANG) != ranks_[i].pid) continue;
    ranks_[i].status = status;
    ended_.push_back(i);
    if (status != 0 && !over_since_) over_since_ = Clock::now();
  }
}

void Attempt::send(int signal) {
  for (RankProcess& rank : ranks_) {
    if (rank.pid <= 0 || rank.status) continue;
    ::kill(rank.pid, signal);
    rank.was_killed_by_us = rank.was_killed_by_us || signal == SIGKILL;
  }
}

void Attempt::run(const std::function<int()>& num_signals, const std::function<int()>& last_signal,
                  const std::function<bool()>& is_over) {
  int num_passed_on = 0;
  while (ended_.size() < ranks_.size()) {
    read_pipes(100);
    reap();
    if (const int count = num_signals(); count > num_passed_on) {
      num_passed_on = count;
      send(last_signal());
    }
    if (!over_since_ && is_over()) over_since_ = Clock::now();
    if (over_since_ && Clock::now() - *over_since_ > kGrace) send(SIGKILL);
  }
  const auto is_open = [](const RankProcess& rank) { return rank.pipe >= 0; };
  for (int i = 0; i < 100 && std::any_of(ranks_.begin(), ranks_.end(), is_open); ++i) read_pipes(20);
}

bool Attempt::has_failed() const {
  return std::any_of(ranks_.begin(), ranks_.end(), [](const RankProcess& rank) { return rank.has_failed(); });
}

const RankProcess& Attempt::culprit() const {
  const auto first = [&](auto is_it) -> const RankProcess* {
    for (const size_t i : ended_)
      if (is_it(ranks_[i])) return &ranks_[i];
    return nullptr;
  };
  if (const RankProcess* rank =
          first([](const RankProcess& r) { return WIFSIGNALED(*r.status) && !r.was_killed_by_us; }))
    return *rank;
  if (const RankProcess* rank = first([](const RankProcess& r) {
        return r.exit_code() != 0 && r.exit_code() != victims_code() && !r.was_killed_by_us;
      }))
    return *rank;
  if (const RankProcess* rank = first([](const RankProcess& r) { return r.was_killed_by_us; })) return *rank;
  return *first([](const RankProcess&) { return true; });
}

}  // namespace caldera
