#include "cli/launch_machines.h"

#include <unistd.h>

#include <algorithm>
#include <limits>
#include <random>
#include <utility>

#include "base/error.h"
#include "base/host.h"
#include "base/log.h"
#include "train/distributed/watch.h"
#include "train/distributed/world.h"

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr auto kBeat = std::chrono::milliseconds(500);
constexpr double kSilent_s = 4;      // a launcher without a beat for so long is not there
constexpr double kWord_s = 2;        // what another launcher knows, it says within so long
constexpr double kRefused_s = 3;     // how long a store that refuses calls may be on its way back
constexpr double kTryConnect_s = 5;  // a single try

std::string here_key(int attempt, int machine) { return fmt::format("launch/here/{}/{}", attempt, machine); }
std::string beat_key(int machine) { return fmt::format("launch/beat/{}", machine); }

std::string names_of(const std::vector<int>& machines) {
  return fmt::format("machine{} {}", machines.size() == 1 ? "" : "s", fmt::join(machines, ", "));
}

// "node1, process 4711"
std::string who(const std::string& launcher) {
  const Json json = json_or_null(launcher);
  return json.is_object() ? fmt::format("{}, process {}", json.value("host", "?"), json.value("process", 0))
                          : "?";
}

}  // namespace

std::string random_id() {
  std::random_device device;
  std::string id;
  for (int i = 0; i < 4; ++i) id += fmt::format("{:08x}", device());
  return id;
}

Rendezvous::Rendezvous(const Machines& machines, StoreAddress address, std::function<int()> stop_signal,
                       const std::string& run_before)
    : machines_(machines), address_(std::move(address)), stop_signal_(std::move(stop_signal)) {
  mine_ = json_line({{"host", host_name()}, {"process", ::getpid()}, {"id", random_id()}});
  StoreAddress reached = address_;
  if (machines_.index == 0) {
    hosted_ = host_store(address_, /*is_local=*/machines_.count == 1, machines_.timeout_s);
    reached = address_;
    reached.host = "127.0.0.1";
    if (machines_.count == 1) address_.host = reached.host;  // nothing else reaches it
  }
  const Clock::time_point start = Clock::now();
  while (!store_) {
    check_stop("it waited for the run's store");
    try {
      store_ = connect_store(reached, "caldera", std::min(machines_.timeout_s, kTryConnect_s));
    } catch (const StoreGone& error) {
      CALDERA_CHECK(since(start) < machines_.node_timeout_s, DistributedError,
                    "{}; machine 0 has not come within {:.0f} s: start it, or wait longer by --node-timeout",
                    error.what(), machines_.node_timeout_s);
      if (since(start) < kTryConnect_s + 2) log_info("waiting for machine 0 at {}", address_.text());
      pause();
    }
  }
  store_->set_timeout(machines_.timeout_s);
  if (run_before.empty()) {
    run_id_ = store_->set_once("launch/run", random_id());
  } else {
    // Machine 0's launcher has been started again, with a new store: the run is the one that went on until
    // then.
    store_->set("launch/run", run_id_ = run_before);
    store_->set_once("launch/attempt", "0");
    begin_next(0);
  }
  thread_ = std::thread([this] {
    for (;;) {
      look_around();
      std::unique_lock lock(mutex_);
      if (wake_.wait_for(lock, kBeat, [this] { return stop_; })) return;
    }
  });
}

Rendezvous::~Rendezvous() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

// Twice a second, on a thread of its own: a store that does not answer must not keep signals from the ranks.
void Rendezvous::look_around() {
  int own_attempt = 0;
  {
    const std::lock_guard lock(mutex_);
    own_attempt = own_attempt_;
  }
  try {
    store_->set(beat_key(machines_.index), fmt::format("{} {}", mine_, num_beats_++));
    const int attempt = std::stoi(store_->find("launch/attempt").value_or("0"));
    const Json end = json_or_null(store_->find("launch/end").value_or(""));
    if (own_attempt >= 0) judge_own_ranks(own_attempt);
    const bool has_cause = own_attempt >= 0 && cause(own_attempt).has_value();
    const std::lock_guard lock(mutex_);
    attempt_ = attempt;
    has_cause_ = own_attempt == own_attempt_ && has_cause;
    if (end.is_object()) end_ = RunEnd{end.value("code", 1), end.value("message", "")};
    lost_since_.reset();
  } catch (const std::exception&) {
    const std::lock_guard lock(mutex_);
    if (!lost_since_) lost_since_ = Clock::now();
  }
}

// The ranks watch each other; where all of a machine are stopped, the first two maybe, their launcher says
// so.
void Rendezvous::judge_own_ranks(int attempt) {
  if (machines_.count * machines_.ranks_each == 1) return;  // a single process has no heartbeat
  // A longer pause was this process's own, or the store's: the ranks may have been stopped as long (scontrol
  // suspend).
  const double elapsed_s = std::min(1.0, since(std::exchange(judged_at_, Clock::now())));
  double shortest = std::numeric_limits<double>::infinity();
  bool is_done = false;
  for (int i = 0; i < machines_.ranks_each; ++i) {
    const auto at = static_cast<size_t>(i);
    const int rank = machines_.index * machines_.ranks_each + i;
    const std::string beat = store_->find(fmt::format("{}/beat/{}", attempt, rank)).value_or("");
    const Json json = json_or_null(beat);
    is_done = is_done || (json.is_object() && json.value("done", false));
    silent_s_[at] = beat == beats_[at] ? silent_s_[at] + elapsed_s : 0;
    beats_[at] = beat;
    shortest = std::min(shortest, silent_s_[at]);
  }
  if (shortest < 1.5 * machines_.timeout_s || is_done) return;
  store_->set_once(
      fmt::format("{}/verdict", attempt),
      fmt::format(
          "no rank of {} ({}) has given a sign of life for {:.0f} s: are they stopped, or does a disk "
          "or driver hang?",
          names_of({machines_.index}), who(mine_), shortest));
}

// For a launcher that others do not hear.
std::string Rendezvous::secret_hint() const {
  return store_->num_rejected() == 0 ? ""
                                     : "; messages signed with another secret have come: is "
                                       "CALDERA_RUN_SECRET the same on all machines?";
}

std::optional<int> Rendezvous::gather() {
  try {
    return meet();
  } catch (const StoreGone& error) {
    throw StoreGone(error.what() + secret_hint());
  }
}

std::optional<int> Rendezvous::meet() {
  const Clock::time_point start = Clock::now();
  std::string said;
  store_->set_once("launch/attempt", "0");
  for (;;) {
    check_stop("it waited for the other machines");
    if (const std::optional<RunEnd> end = ended()) {
      if (end->code == 0) return std::nullopt;
      throw Error(end->message, end->code);
    }
    const int attempt = std::stoi(store_->find("launch/attempt").value_or("0"));
    const std::string holder = store_->set_once(here_key(attempt, machines_.index), mine_);
    if (holder != mine_) {
      // This machine's launcher of before, which is gone, or a second one that was given the same number.
      const std::string before = store_->find(beat_key(machines_.index)).value_or("");
      bool is_alive = false;
      for (const Clock::time_point looked = Clock::now(); since(looked) < kSilent_s && !is_alive; pause()) {
        const std::string beat = store_->find(beat_key(machines_.index)).value_or("");
        is_alive = beat != before && beat.starts_with(holder);
      }
      CALDERA_CHECK(!is_alive, ConfigError,
                    "--node-rank {}: the launcher on {} is this machine of the run already", machines_.index,
                    who(holder));
      begin_next(attempt);
      continue;
    }
    const std::vector<int> absent = missing(attempt);
    if (absent.empty()) {
      const std::string run = store_->find("launch/run").value_or(run_id_);
      const std::lock_guard lock(mutex_);
      attempt_ = std::max(attempt_, attempt);
      own_attempt_ = attempt;
      run_id_ = run;
      has_cause_ = false;
      beats_.assign(static_cast<size_t>(machines_.ranks_each), "");
      silent_s_.assign(static_cast<size_t>(machines_.ranks_each), 0);
      judged_at_ = Clock::now();
      return attempt;
    }
    const std::string names = names_of(absent);
    CALDERA_CHECK(since(start) < machines_.node_timeout_s, DistributedError,
                  "waited {:.0f} s for {}: start caldera launch there, with the same --rendezvous and "
                  "--nodes, or wait longer "
                  "by --node-timeout{}",
                  since(start), names, secret_hint());
    if (names != said && since(start) > 1) log_info("waiting for {}", said = names);
    pause();
  }
}

std::vector<int> Rendezvous::missing(int attempt) {
  std::vector<int> machines;
  for (int m = 0; m < machines_.count; ++m)
    if (m != machines_.index && !store_->find(here_key(attempt, m))) machines.push_back(m);
  return machines;
}

bool Rendezvous::is_over(int attempt) const {
  const std::lock_guard lock(mutex_);
  return attempt_ > attempt || has_cause_ || (end_ && end_->code != 0) ||
         (lost_since_ && since(*lost_since_) > kRefused_s);
}

bool Rendezvous::wait_for_end(int attempt) {
  for (;; pause()) {
    check_stop("it waited for the other machines to end");
    const std::lock_guard lock(mutex_);
    if (end_) {
      if (end_->code != 0) throw Error(end_->message, end_->code);
      return true;
    }
    if (attempt_ > attempt) return false;
    if (lost_since_ && since(*lost_since_) > kRefused_s) return true;  // its host has ended, as this one may
  }
}

std::optional<std::string> Rendezvous::cause(int attempt) {
  if (auto failure = store_->find(fmt::format("{}/failure", attempt))) return failure;
  return store_->find(fmt::format("{}/verdict", attempt));
}

std::string Rendezvous::where(int attempt, int rank) {
  const Json beat = json_or_null(store_->find(fmt::format("{}/beat/{}", attempt, rank)).value_or(""));
  return beat.is_object() ? place_of(beat) : "";
}

bool Rendezvous::all_are_alive() {
  const auto beats = [this] {
    std::vector<std::string> list;
    for (int m = 0; m < machines_.count; ++m)
      if (m != machines_.index) list.push_back(store_->find(beat_key(m)).value_or(""));
    return list;
  };
  const std::vector<std::string> before = beats();
  const Clock::time_point start = Clock::now();
  for (;;) {
    const std::vector<std::string> now = beats();
    if (ended()) return true;
    bool all_moved = true;
    for (size_t i = 0; i < now.size(); ++i) all_moved = all_moved && now[i] != before[i];
    if (all_moved) return true;
    if (since(start) > kSilent_s) return false;
    pause();
  }
}

std::optional<RunEnd> Rendezvous::wait_for_word() {
  const Clock::time_point start = Clock::now();
  while (machines_.count > 1 && !ended() && since(start) < kWord_s) pause();
  return ended();
}

void Rendezvous::begin_next(int attempt) {
  store_->replace("launch/attempt", std::to_string(attempt), std::to_string(attempt + 1));
}

void Rendezvous::end(const RunEnd& end) {
  try {
    store_->set_once("launch/end", json_line({{"code", end.code}, {"message", end.message}}));
    store_->set(fmt::format("launch/left/{}", machines_.index), "");
    if (!hosted_) return;
    const Clock::time_point start = Clock::now();
    for (int m = 1; m < machines_.count; ++m)
      while (!store_->find(fmt::format("launch/left/{}", m)) && since(start) < kWord_s)
        std::this_thread::sleep_for(kBeat / 5);
  } catch (const std::exception&) {
    // The others find the store gone, and end by that.
  }
}

std::optional<RunEnd> Rendezvous::ended() const {
  const std::lock_guard lock(mutex_);
  return end_;
}

void Rendezvous::check_stop(const char* while_what) const {
  const int signal = stop_signal_();
  if (signal != 0)
    throw Error(fmt::format("stopped by signal {} while {}", signal, while_what), 128 + signal);
}

void Rendezvous::pause() { std::this_thread::sleep_for(kBeat / 5); }

}  // namespace caldera
