// caldera launch -n N [--nodes M --node-rank K --rendezvous HOST:PORT] [--max-restarts R] -- train ...
// Starts the ranks of one machine and stays with them: the first rank's output on the terminal, each rank's
// in its own file, signals passed on, and when one fails all end, with its name and message.
#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "base/error.h"
#include "base/files.h"
#include "base/strings.h"
#include "cli/train.h"
#include "train/distributed/store_host.h"

extern char** environ;

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;
// How long the others may take to end by themselves once a rank has failed; they look for the cause
// meanwhile.
constexpr auto kGrace = std::chrono::seconds(6);

volatile std::sig_atomic_t g_signal_to_pass_on = 0;
void pass_on_signal(int signal) { g_signal_to_pass_on = signal; }

struct LaunchCommand {
  int num_ranks = 0;
  int num_nodes = 1, node_rank = 0;
  std::string rendezvous;  // HOST:PORT of the first machine
  int max_restarts = 0;
  std::vector<std::string> command;  // train ...
};

// One rank's process, its output pipe and its log.
struct Rank {
  int rank = 0;
  pid_t pid = -1;
  int pipe = -1;
  std::ofstream log;
  std::string last_error;     // the last line that began with "error: "
  std::string line;           // under way
  std::optional<int> status;  // as waitpid gives it, once it has ended
  bool was_killed_by_us = false;

  bool is_on_terminal() const { return rank == 0; }
  void take(std::string_view text);
};

void Rank::take(std::string_view text) {
  log << text << std::flush;
  if (is_on_terminal()) {
    std::fwrite(text.data(), 1, text.size(), stderr);
    std::fflush(stderr);
  }
  for (const char c : text) {
    if (c != '\n') {
      line.push_back(c);
      continue;
    }
    if (line.starts_with("error: ")) last_error = line.substr(7);
    line.clear();
  }
}

class Attempt {
 public:
  Attempt(const LaunchCommand& command, const fs::path& log_folder, int number, const std::string& address,
          int port);
  ~Attempt();
  // Until all have ended.
  void run();
  const std::vector<Rank>& ranks() const { return ranks_; }
  // Ranks in the order in which they ended.
  const std::vector<size_t>& ended() const { return ended_; }

 private:
  void start(Rank& rank, const LaunchCommand& command, int number, const std::string& address, int port);
  void read_pipes(int timeout_ms);
  void reap();
  void send(int signal);

  std::vector<Rank> ranks_;
  std::vector<size_t> ended_;
  std::optional<Clock::time_point> failed_at_;
};

Attempt::Attempt(const LaunchCommand& command, const fs::path& log_folder, int number,
                 const std::string& address, int port)
    : ranks_(static_cast<size_t>(command.num_ranks)) {
  for (size_t i = 0; i < ranks_.size(); ++i) {
    Rank& rank = ranks_[i];
    rank.rank = command.node_rank * command.num_ranks + static_cast<int>(i);
    const fs::path path = log_folder / fmt::format("rank-{}.log", rank.rank);
    rank.log.open(path, std::ios::app);
    CALDERA_CHECK(rank.log.good(), Error, "{}: cannot open for appending", path.string());
    start(rank, command, number, address, port);
  }
}

Attempt::~Attempt() {
  send(SIGKILL);
  for (Rank& rank : ranks_) {
    if (rank.pid > 0 && !rank.status) ::waitpid(rank.pid, nullptr, 0);
    if (rank.pipe >= 0) ::close(rank.pipe);
  }
}

void Attempt::start(Rank& rank, const LaunchCommand& command, int number, const std::string& address,
                    int port) {
  const int local_rank = rank.rank - command.node_rank * command.num_ranks;
  std::vector<std::string> variables = {
      "CALDERA_LAUNCH=1",
      fmt::format("RANK={}", rank.rank),
      fmt::format("WORLD_SIZE={}", command.num_ranks * command.num_nodes),
      fmt::format("LOCAL_RANK={}", local_rank),
      fmt::format("LOCAL_WORLD_SIZE={}", command.num_ranks),
      fmt::format("GROUP_RANK={}", command.node_rank),
      fmt::format("MASTER_ADDR={}", address),
      fmt::format("MASTER_PORT={}", port),
      "TORCHELASTIC_USE_AGENT_STORE=True",
      fmt::format("TORCHELASTIC_RESTART_COUNT={}", number),
      fmt::format("TORCHELASTIC_MAX_RESTARTS={}", command.max_restarts),
  };
  // The ranks share the machine's cores, and threads that wait must not spin on them.
  const int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / command.num_ranks);
  if (std::getenv("OMP_NUM_THREADS") == nullptr)
    variables.push_back(fmt::format("OMP_NUM_THREADS={}", threads));
  if (std::getenv("OMP_WAIT_POLICY") == nullptr) variables.push_back("OMP_WAIT_POLICY=passive");
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string name = std::string(*variable).substr(0, std::string(*variable).find('=') + 1);
    if (std::none_of(variables.begin(), variables.end(),
                     [&](const std::string& ours) { return ours.starts_with(name); }))
      variables.emplace_back(*variable);
  }
  std::vector<std::string> words = {"caldera"};
  words.insert(words.end(), command.command.begin(), command.command.end());
  const auto pointers = [](std::vector<std::string>& texts) {
    std::vector<char*> list;
    for (std::string& text : texts) list.push_back(text.data());
    list.push_back(nullptr);
    return list;
  };
  const std::vector<char*> environment = pointers(variables), arguments = pointers(words);

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
  std::vector<Rank*> whose;
  for (Rank& rank : ranks_) {
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
    if (status != 0 && !failed_at_) failed_at_ = Clock::now();
  }
}

void Attempt::send(int signal) {
  for (Rank& rank : ranks_) {
    if (rank.pid <= 0 || rank.status) continue;
    ::kill(rank.pid, signal);
    rank.was_killed_by_us = rank.was_killed_by_us || signal == SIGKILL;
  }
}

void Attempt::run() {
  int passed_on = 0;
  while (ended_.size() < ranks_.size()) {
    read_pipes(100);
    reap();
    if (const int signal = g_signal_to_pass_on; signal != 0 && passed_on < 2) {
      send(signal);
      ++passed_on;
      g_signal_to_pass_on = 0;
    }
    if (failed_at_ && Clock::now() - *failed_at_ > kGrace) send(SIGKILL);
  }
  for (int i = 0;
       i < 100 && std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& r) { return r.pipe >= 0; }); ++i)
    read_pipes(20);
}

int exit_code_of(const Rank& rank) {
  const int status = rank.status.value_or(0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : DistributedError("").exit_code();
}

// The rank that brought the others down: one that a signal killed, else one that failed by itself, else the
// first to end.
const Rank& culprit_of(const Attempt& attempt) {
  const int victim = DistributedError("").exit_code();
  const auto first = [&](auto is_it) -> const Rank* {
    for (const size_t i : attempt.ended())
      if (is_it(attempt.ranks()[i])) return &attempt.ranks()[i];
    return nullptr;
  };
  if (const Rank* rank = first([](const Rank& r) { return WIFSIGNALED(*r.status) && !r.was_killed_by_us; }))
    return *rank;
  if (const Rank* rank = first([&](const Rank& r) {
        return exit_code_of(r) != 0 && exit_code_of(r) != victim && !r.was_killed_by_us;
      }))
    return *rank;
  if (const Rank* rank = first([](const Rank& r) { return r.was_killed_by_us; })) return *rank;
  return *first([](const Rank&) { return true; });
}

std::string describe(const Rank& culprit, const Attempt& attempt, const StoreHost* store, int number) {
  const std::string where = store != nullptr ? store->where(number, culprit.rank) : "";
  const auto cause = store != nullptr ? store->cause(number) : std::nullopt;
  const int status = *culprit.status;
  std::string text = fmt::format("rank {}", culprit.rank);
  if (culprit.was_killed_by_us)
    text += " did not end when the others had to, and was killed";
  else if (WIFSIGNALED(status))
    text += fmt::format(" was killed by signal {} ({})", WTERMSIG(status), ::strsignal(WTERMSIG(status)));
  else if (exit_code_of(culprit) == 0)
    text += " left before the others";
  else
    text += " failed";
  if (!where.empty()) text += fmt::format(" at {}", where);
  if (!culprit.last_error.empty()) text += ": " + culprit.last_error;
  // Where all that ended by themselves are victims, what they say of the culprit comes first.
  const bool is_victim = !culprit.was_killed_by_us &&
                         exit_code_of(culprit) == DistributedError("").exit_code() && !WIFSIGNALED(status);
  if (cause && culprit.was_killed_by_us) text += ": " + *cause;
  if (cause && is_victim) text = *cause;
  if (attempt.ranks().size() > 1)
    text += fmt::format(" (exit codes by rank: {})", [&] {
      std::vector<std::string> codes;
      for (const Rank& rank : attempt.ranks())
        codes.push_back(WIFSIGNALED(*rank.status) ? fmt::format("signal {}", WTERMSIG(*rank.status))
                                                  : std::to_string(exit_code_of(rank)));
      return join(codes, ", ");
    }());
  return text;
}

// What the ranks will do, read here first: a faulty command or recipe is said once, not N times.
fs::path log_folder_of(const LaunchCommand& command) {
  CALDERA_CHECK(command.command.front() == "train", ConfigError, "launch starts \"train\" alone, got \"{}\"",
                command.command.front());
  CLI::App app;
  TrainCommand train;
  add_train_options(app, train);
  std::vector<std::string> reversed(command.command.rbegin(), command.command.rend() - 1);
  try {
    app.parse(reversed);
  } catch (const CLI::ParseError& error) {
    throw ConfigError(fmt::format("train: {}", error.what()));
  }
  return fs::path(read_recipe(train.recipe, train.overrides).output) / "logs";
}

void launch(const LaunchCommand& command) {
  CALDERA_CHECK(command.node_rank < command.num_nodes, ConfigError, "--node-rank {}: expected 0 to {}",
                command.node_rank, command.num_nodes - 1);
  CALDERA_CHECK(command.num_nodes == 1 || !command.rendezvous.empty(), ConfigError,
                "--nodes {}: also give --rendezvous HOST:PORT, where HOST is the first machine",
                command.num_nodes);
  std::string address = "127.0.0.1";
  int port = 0;
  if (!command.rendezvous.empty()) {
    const size_t colon = command.rendezvous.rfind(':');
    const std::string digits = colon == std::string::npos ? "" : command.rendezvous.substr(colon + 1);
    CALDERA_CHECK(!digits.empty() && digits.size() < 6 &&
                      digits.find_first_not_of("0123456789") == std::string::npos &&
                      std::stoi(digits) < 65536,
                  ConfigError, "--rendezvous {}: expected HOST:PORT", command.rendezvous);
    address = command.rendezvous.substr(0, colon);
    port = std::stoi(digits);
  }
  const fs::path logs = log_folder_of(command);
  fs::create_directories(logs);
  std::unique_ptr<StoreHost> store;
  if (command.node_rank == 0) {
    store = std::make_unique<StoreHost>(port);
    port = store->port();
  }
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) std::signal(signal, pass_on_signal);
  for (int number = 0;; ++number) {
    Attempt attempt(command, logs, number, address, port);
    attempt.run();
    const auto failed = [](const Rank& rank) { return *rank.status != 0; };
    if (std::none_of(attempt.ranks().begin(), attempt.ranks().end(), failed)) return;
    const Rank& culprit = culprit_of(attempt);
    const int code = exit_code_of(culprit) == 0 ? DistributedError("").exit_code() : exit_code_of(culprit);
    if (code > 128 && !WIFSIGNALED(*culprit.status))
      throw Error(culprit.last_error, code);  // stopped as asked, after saving
    const std::string message =
        fmt::format("{}; logs: {}", describe(culprit, attempt, store.get(), number), logs.string());
    // A faulty recipe, data or weights do not get better.
    const bool may_help = code != 2 && code != 3 && code != 4;
    if (number >= command.max_restarts || !may_help) throw Error(message, code);
    fmt::print(stderr, "warning: {}\nstarting again from the last checkpoint ({} of {})\n", message,
               number + 1, command.max_restarts);
  }
}

}  // namespace

void setup_launch(CLI::App& command) {
  auto options = std::make_shared<LaunchCommand>();
  command.add_option("-n,--num-ranks", options->num_ranks, "processes on this machine; on GPUs one for each")
      ->required()
      ->check(CLI::Range(1, 1024));
  command.add_option("--nodes", options->num_nodes, "machines; start this command on each")
      ->check(CLI::Range(1, 65536));
  command.add_option("--node-rank", options->node_rank, "which machine this is, from 0")
      ->check(CLI::Range(0, 65535));
  command.add_option("--rendezvous", options->rendezvous, "HOST:PORT of the first machine, where all meet");
  command
      .add_option("--max-restarts", options->max_restarts,
                  "how often a failed run starts again from its last checkpoint")
      ->check(CLI::Range(0, 1000000));
  command.add_option("command", options->command, "after --: train RECIPE.yaml and its options")->required();
  command.callback([options] { launch(*options); });
}

}  // namespace caldera
