// The ranks of one machine: their processes, from their start to the last one's end.
#pragma once
#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace caldera {

// One rank's process, its output pipe and its log.
struct RankProcess {
  int rank = 0;
  bool is_on_terminal = false;
  pid_t pid = -1;
  int pipe = -1;
  std::ofstream log;
  std::string error;          // from the last line that began with "error: " on
  std::string line;           // under way
  std::optional<int> status;  // as waitpid gives it, once it has ended
  bool was_killed_by_us = false;

  void take(std::string_view text);
  int exit_code() const;  // of a process that a signal ended: 5
  bool has_failed() const { return status && *status != 0; }
};

struct RankProcesses {
  int first_rank = 0, count = 0;
  std::vector<std::string> command;              // what follows the program's name
  std::map<std::string, std::string> variables;  // of all ranks, in place of this process's
  std::filesystem::path logs;                    // rank-K.log is written there, at its end
};

class Attempt {
 public:
  explicit Attempt(const RankProcesses& ranks);
  ~Attempt();
  // Until all have ended. Signals that `num_signals` counts are passed on, `last_signal` each time. Once a
  // rank has failed or `is_over` says so, those left have some seconds to end by themselves.
  void run(const std::function<int()>& num_signals, const std::function<int()>& last_signal,
           const std::function<bool()>& is_over);
  const std::vector<RankProcess>& ranks() const { return ranks_; }
  bool has_failed() const;
  // The rank that brought the others down: one that a signal killed, else one that failed by itself, else the
  // first to end.
  const RankProcess& culprit() const;

 private:
  void start(RankProcess& rank, const RankProcesses& all);
  void read_pipes(int timeout_ms);
  void reap();
  void send(int signal);

  std::vector<RankProcess> ranks_;
  std::vector<size_t> ended_;  // in the order in which they did
  std::optional<std::chrono::steady_clock::time_point> over_since_;
};

}  // namespace caldera
