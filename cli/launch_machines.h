// What the launchers of a run's machines tell each other, through the run's store: which attempt runs, who is
// there, how it ended. The first machine's launcher hosts the store, so it lives as long as that one.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/json.h"
#include "train/distributed/text_store.h"

namespace caldera {

struct Machines {
  int count = 1, index = 0;
  int ranks_each = 1;
  double timeout_s = 600;       // the recipe's: how long a rank, or the store, may be silent
  double node_timeout_s = 600;  // how long the other machines' launchers are waited for
};

std::string random_id();  // 32 hex digits

// How a run ended for all machines: no attempt follows.
struct RunEnd {
  int code = 0;
  std::string message;
};

// Keys, below caldera/: launch/attempt, launch/run, launch/here/ATTEMPT/MACHINE {"host", "process", "id"},
// launch/beat/MACHINE, launch/end {"code", "message"}, launch/left/MACHINE; and what the ranks write
// (watch.h) below ATTEMPT/.
class Rendezvous {
 public:
  // Hosts the store, or comes to it, waiting for node_timeout_s. `stop_signal` ends every wait here. Throws
  // DistributedError where the store cannot be reached.
  // `run_before`: the run_id() that this launcher took part in until the store went, "" for none.
  Rendezvous(const Machines& machines, StoreAddress address, std::function<int()> stop_signal,
             const std::string& run_before);
  ~Rendezvous();
  const StoreAddress& address() const { return address_; }
  std::string run_id() const { return run_id_; }

  // Waits until the launchers of all machines are there; the attempt that now begins, none where the run has
  // ended well. Throws DistributedError naming those who did not come within node_timeout_s, ConfigError
  // where another launcher is this machine already, and what the others say of a run that has failed.
  std::optional<int> gather();
  // Whether the ranks of this machine should end: the others go on without them, or they were told to.
  bool is_over(int attempt) const;
  // After this machine's ranks ended well: true when the run has, on all machines; false where an attempt
  // follows.
  bool wait_for_end(int attempt);
  // Why an attempt ended: the first rank's own failure, else what the watch found; none where neither was
  // told.
  std::optional<std::string> cause(int attempt);
  // Where a rank was last: "step 12, forward and backward"; "" where it never came.
  std::string where(int attempt, int rank);
  // Whether each other launcher gives signs of life; waits some seconds for them.
  bool all_are_alive();
  // What another machine's launcher says of the end, which may take it a moment.
  std::optional<RunEnd> wait_for_word();

  void begin_next(int attempt);  // unless another has
  void end(const RunEnd& end);   // unless another has; waits until the others have heard of it
  std::optional<RunEnd> ended() const;

 private:
  void look_around();
  void judge_own_ranks(int attempt);
  std::optional<int> meet();
  std::string secret_hint() const;
  std::vector<int> missing(int attempt);
  void check_stop(const char* while_what) const;
  void pause();

  const Machines machines_;
  StoreAddress address_;
  const std::function<int()> stop_signal_;
  std::string mine_, run_id_;  // mine_: this launcher, as JSON
  c10::intrusive_ptr<c10d::Store> hosted_;
  std::unique_ptr<TextStore> store_;

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  int64_t num_beats_ = 0;
  int attempt_ = 0, own_attempt_ = -1;  // the one that runs; the one of this machine's ranks
  bool has_cause_ = false;              // of own_attempt_
  std::optional<RunEnd> end_;
  std::optional<std::chrono::steady_clock::time_point> lost_since_;
  std::vector<std::string> beats_;  // of this machine's ranks, and for how long each has not changed
  std::vector<double> silent_s_;
  std::chrono::steady_clock::time_point judged_at_;
  std::thread thread_;
};

}  // namespace caldera
