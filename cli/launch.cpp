// caldera launch -n N [--nodes M --node-rank K --rendezvous HOST:PORT] [--max-restarts R] -- train ...
// Starts the ranks of one machine and stays with them: the first one's output on the terminal, each rank's in
// its own file, signals passed on, and when one fails all end, with its name and message.
#include <sys/stat.h>
#include <sys/wait.h>

#include <algorithm>
#include <csignal>
#include <cstring>

#include "base/error.h"
#include "base/files.h"
#include "base/log.h"
#include "base/strings.h"
#include "cli/launch_machines.h"
#include "cli/launch_ranks.h"
#include "cli/train.h"
#include "train/distributed/world.h"

namespace caldera {
namespace {

// Never forgotten: what the user ended is not started again.
volatile std::sig_atomic_t g_last_signal = 0, g_num_signals = 0;
void on_launcher_signal(int signal) {
  g_last_signal = signal;
  g_num_signals = g_num_signals + 1;
}

struct LaunchCommand {
  int num_ranks = 0;
  int num_nodes = 1, node_rank = 0;
  std::string rendezvous;  // HOST:PORT of the first machine
  double node_timeout_s = 600;
  int max_restarts = 0;
  std::vector<std::string> command;  // train ...
};

// HOST:PORT, or [ADDRESS]:PORT with colons in it.
StoreAddress parse_rendezvous(const std::string& text) {
  const size_t colon = text.rfind(':');
  const std::string digits = colon == std::string::npos ? "" : text.substr(colon + 1);
  std::string host = text.substr(0, colon);
  const bool is_bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  CALDERA_CHECK(
      !digits.empty() && digits.size() < 6 && digits.find_first_not_of("0123456789") == std::string::npos &&
          std::stoi(digits) < 65536 && !host.empty() && (is_bracketed || host.find(':') == std::string::npos),
      ConfigError, "--rendezvous {}: expected HOST:PORT, or [IPV6-ADDRESS]:PORT", text);
  if (is_bracketed) host = host.substr(1, host.size() - 2);
  return {.host = host, .port = std::stoi(digits), .secret = ""};
}

// What the ranks will do, read here first: a faulty command or recipe is said once, not N times.
Recipe recipe_of(const LaunchCommand& command) {
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
  return read_recipe(train.recipe, train.overrides);
}

// What values in the run's store are signed with. On one machine a new one for each run, which its ranks
// alone are told.
std::string choose_secret(const LaunchCommand& command, const fs::path& output) {
  if (const std::string given = run_secret(); !given.empty()) return given;
  if (command.num_nodes == 1) return random_id();
  const fs::path file = output / ".run_secret";
  struct stat status {};
  if (::stat(file.c_str(), &status) == 0) {
    CALDERA_CHECK((status.st_mode & 077) == 0, ConfigError, "{}: others may read it; say chmod 600 {}",
                  file.string(), file.string());
    std::string secret(strip(read_file(file)));
    CALDERA_CHECK(!secret.empty(), ConfigError, "{}: empty: expected the run's secret", file.string());
    return secret;
  }
  log_warning(
      "whoever reaches port {} of machine 0 can end this run: set CALDERA_RUN_SECRET to the same text on all "
      "machines, or "
      "write one into {} with mode 600",
      parse_rendezvous(command.rendezvous).port, file.string());
  return "";
}

struct Failure {
  int code = 0;
  std::string text;
  bool is_victims = false;  // the cause lies with another machine's rank, or is not known here
};

Failure describe(const Attempt& attempt, Rendezvous& rendezvous, int number) {
  const RankProcess& culprit = attempt.culprit();
  const int status = *culprit.status, victims_code = DistributedError("").exit_code();
  std::string where;
  std::optional<std::string> cause;
  try {
    where = rendezvous.where(number, culprit.rank);
    cause = rendezvous.cause(number);
  } catch (const StoreError&) {
    // The store has gone with its host: what the ranks said is all that is known.
  }
  std::string text = fmt::format("rank {}", culprit.rank);
  if (culprit.was_killed_by_us)
    text += " did not end when the others had to, and was killed";
  else if (WIFSIGNALED(status))
    text += fmt::format(" was killed by signal {} ({})", WTERMSIG(status), ::strsignal(WTERMSIG(status)));
  else if (culprit.exit_code() == 0)
    text += " left before the others";
  else
    text += " failed";
  if (!where.empty()) text += fmt::format(" at {}", where);
  if (!culprit.error.empty()) text += ": " + culprit.error;
  // Where all that ended by themselves are victims, what they say of the culprit comes first.
  const bool is_victim =
      !culprit.was_killed_by_us && culprit.exit_code() == victims_code && !WIFSIGNALED(status);
  if (cause && culprit.was_killed_by_us) text += ": " + *cause;
  if (cause && is_victim) text = *cause;
  if (attempt.ranks().size() > 1) {
    std::vector<std::string> codes;
    for (const RankProcess& rank : attempt.ranks())
      codes.push_back(WIFSIGNALED(*rank.status) ? fmt::format("signal {}", WTERMSIG(*rank.status))
                                                : std::to_string(rank.exit_code()));
    text += fmt::format(" (exit codes by rank: {})", join(codes, ", "));
  }
  return {.code = culprit.exit_code() == 0 ? victims_code : culprit.exit_code(),
          .text = text,
          .is_victims = is_victim};
}

// Ranks that were told to end, by a signal: not started again. None where that is not so.
std::optional<RunEnd> end_as_asked(const Attempt& attempt, const Failure& failure, Rendezvous& rendezvous) {
  const RankProcess& culprit = attempt.culprit();
  const bool has_saved = failure.code > 128 && WIFEXITED(*culprit.status);
  if (const int signal = g_last_signal) {
    if (has_saved) return RunEnd{failure.code, culprit.error};
    if (WIFSIGNALED(*culprit.status) && !culprit.was_killed_by_us)
      return RunEnd{
          128 + signal,
          fmt::format("stopped by signal {} while there was nothing to save; the same command goes on",
                      signal)};
    return RunEnd{failure.code, failure.text};
  }
  // By a signal that another machine's launcher passed on. Or that one has died, which its ranks are told by
  // a signal as well; then it is a failure as others.
  try {
    if (has_saved && rendezvous.all_are_alive()) return RunEnd{failure.code, culprit.error};
  } catch (const StoreError&) {
    // Its host's launcher has died.
  }
  return std::nullopt;
}

void launch(const LaunchCommand& command) {
  for (const int signal : {SIGINT, SIGTERM, SIGUSR1}) std::signal(signal, on_launcher_signal);
  CALDERA_CHECK(command.node_rank < command.num_nodes, ConfigError, "--node-rank {}: expected 0 to {}",
                command.node_rank, command.num_nodes - 1);
  CALDERA_CHECK(command.num_nodes == 1 || !command.rendezvous.empty(), ConfigError,
                "--nodes {}: also give --rendezvous HOST:PORT, where HOST is the first machine",
                command.num_nodes);
  survive_broken_connections();
  quiet_c10d();
  StoreAddress address = command.rendezvous.empty() ? StoreAddress{} : parse_rendezvous(command.rendezvous);
  const Recipe recipe = recipe_of(command);
  const fs::path logs = fs::path(recipe.output) / "logs";
  fs::create_directories(logs);
  address.secret = choose_secret(command, recipe.output);
  const Machines machines{.count = command.num_nodes,
                          .index = command.node_rank,
                          .ranks_each = command.num_ranks,
                          .timeout_s = recipe.distributed.timeout_s,
                          .node_timeout_s = command.node_timeout_s};
  const auto stop_signal = [] { return static_cast<int>(g_last_signal); };
  std::unique_ptr<Rendezvous> rendezvous;
  std::string run_before;
  // Machine 0's launcher has gone, or the way to it: both may come back, while there are restarts left.
  const auto meet_again = [&](const StoreError& error) {
    if (command.node_rank == 0 || command.max_restarts == 0) throw error;
    log_warning("{}", error.what());
    if (rendezvous) run_before = rendezvous->run_id();
    rendezvous.reset();
  };
  for (int num_failures = 0;; ++num_failures) {
    std::optional<int> number;
    try {
      if (!rendezvous) rendezvous = std::make_unique<Rendezvous>(machines, address, stop_signal, run_before);
      number = rendezvous->gather();
    } catch (const StoreError& error) {
      meet_again(error);
      continue;
    }
    if (!number) return;
    Attempt attempt({.first_rank = command.node_rank * command.num_ranks,
                     .count = command.num_ranks,
                     .command = command.command,
                     .variables = {{"CALDERA_LAUNCH", "1"},
                                   {"CALDERA_RUN_ID", rendezvous->run_id()},
                                   {"CALDERA_RUN_SECRET", address.secret},
                                   {"WORLD_SIZE", std::to_string(command.num_ranks * command.num_nodes)},
                                   {"GROUP_RANK", std::to_string(command.node_rank)},
                                   {"MASTER_ADDR", rendezvous->address().host},
                                   {"MASTER_PORT", std::to_string(rendezvous->address().port)},
                                   {"TORCHELASTIC_USE_AGENT_STORE", "True"},
                                   {"TORCHELASTIC_RESTART_COUNT", std::to_string(*number)},
                                   {"TORCHELASTIC_MAX_RESTARTS", std::to_string(command.max_restarts)}},
                     .logs = logs});
    attempt.run([] { return static_cast<int>(g_num_signals); }, stop_signal,
                [&] { return rendezvous->is_over(*number); });
    if (!attempt.has_failed()) {
      if (command.node_rank == 0) return rendezvous->end({});
      if (rendezvous->wait_for_end(*number)) return;
      continue;
    }
    Failure failure = describe(attempt, *rendezvous, *number);
    if (const auto end = end_as_asked(attempt, failure, *rendezvous)) {
      rendezvous->end(*end);
      throw Error(end->message, end->code);
    }
    failure.text += fmt::format("; logs: {}", logs.string());
    // A faulty recipe, data or weights do not get better.
    const bool may_help = failure.code != 2 && failure.code != 3 && failure.code != 4;
    if (std::max(*number, num_failures) >= command.max_restarts || !may_help) {
      // The machine whose rank it was knows more.
      const std::optional<RunEnd> word = failure.is_victims ? rendezvous->wait_for_word() : std::nullopt;
      if (word && word->code != 0) throw Error(word->message, word->code);
      rendezvous->end({failure.code, failure.text});
      throw Error(failure.text, failure.code);
    }
    fmt::print(stderr, "warning: {}\nstarting again from the last checkpoint ({} of {})\n", failure.text,
               std::max(*number, num_failures) + 1, command.max_restarts);
    try {
      rendezvous->begin_next(*number);
    } catch (const StoreError& error) {
      meet_again(error);
    }
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
      .add_option("--node-timeout", options->node_timeout_s,
                  "seconds to wait for the other machines, at the start and at each restart")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      .add_option("--max-restarts", options->max_restarts,
                  "how often a failed run starts again from its last checkpoint")
      ->check(CLI::Range(0, 1000000));
  command.add_option("command", options->command, "after --: train RECIPE.yaml and its options")->required();
  command.callback([options] { launch(*options); });
}

}  // namespace caldera
