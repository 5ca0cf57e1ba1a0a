// The watch over the ranks of a run, through the store alone: heartbeats, failures, and the verdict on who is
// to blame.
#pragma once
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "train/distributed/judge.h"
#include "train/distributed/text_store.h"

namespace caldera {

struct WatchSpec {
  int rank = 0, size = 1;
  std::string host;  // this rank's machine, for messages; "" where all ranks are on one
  double timeout_s = 0;
};

// Keys: beat/RANK a rank's heartbeat (see Judge), "failure" the first rank's own error, "verdict" what all
// say.
class Watch {
 public:
  // `on_abort`: see World; the watch ends with it. Heartbeats begin at once: twice a second, and with each
  // at(). `store` is the watch's own. Where it gives no answer (DistributedError) this process has to end at
  // once; where it is gone, after the few seconds in which the training thread may do so by itself.
  Watch(const WatchSpec& spec, std::unique_ptr<TextStore> store,
        std::function<void(const std::string&)> on_abort);
  // The last heartbeat says that this rank is done: it is missed by nobody.
  ~Watch();

  // Where the training lane is.
  void at(int64_t step, const char* phase);
  // While it lives, a lane waits for other ranks. That the wait ends is headway, as a new phase is: a long
  // phase has many.
  class Waits {
   public:
    Waits(Watch& watch, Lane lane);
    ~Waits();
    Waits(const Waits&) = delete;
    Waits& operator=(const Waits&) = delete;

   private:
    Watch& watch_;
    const Lane lane_;
    const LaneState before_;
  };
  // The saving lane is on from here to end_saving(). Where the training thread itself writes the training
  // lane is off.
  void begin_saving(int64_t step, bool on_training_thread);
  void end_saving(bool on_training_thread);
  // A counter for HeadwayScope.
  std::atomic<int64_t>& headway(Lane lane) { return this->lane(lane).place; }
  std::string where() const;  // "step 12, backward", of the training lane

 private:
  struct LaneNow {
    std::atomic<int64_t> step = 0, place = 0;
    std::atomic<const char*> phase = "starting";
    std::atomic<LaneState> state = LaneState::kOff;
    Json describe() const;
  };
  LaneNow& lane(Lane lane) { return lanes_[static_cast<size_t>(lane)]; }
  const LaneNow& lane(Lane lane) const { return lanes_[static_cast<size_t>(lane)]; }
  void run();
  void beat(bool done);
  // Why this process has to end, if it has to.
  std::optional<std::string> look_around(double elapsed_s);

  const WatchSpec spec_;
  const std::unique_ptr<TextStore> store_;
  const std::function<void(const std::string&)> on_abort_;
  std::array<LaneNow, kNumLanes> lanes_;
  int64_t beats_ = 0;
  Judge judge_;
  bool all_here_ = false;
  std::optional<std::chrono::steady_clock::time_point> doomed_at_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false, moved_ = false;
  std::thread thread_;  // last: it uses all of the above
};

// For a rank that lost contact: the failure or verdict that is there or comes within two seconds, else which
// ranks' hearts have stopped. Throws what the store throws.
std::string find_cause(TextStore& store, int rank, int size);

}  // namespace caldera
