// The watch over the ranks of a run, through the store alone: heartbeats, failures, and the verdict on who is
// to blame.
#pragma once
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
#include <vector>

#include "base/json.h"

namespace caldera {

// What the watch needs of a store: c10d's, or a test's. Calls return at once, or throw when the store is
// gone.
class TextStore {
 public:
  virtual ~TextStore() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  virtual std::optional<std::string> find(const std::string& key) = 0;
  virtual std::vector<std::string> get_all(const std::vector<std::string>& keys) = 0;  // keys that are there
  // Sets the key where it is absent; what it holds afterwards.
  virtual std::string set_once(const std::string& key, const std::string& value) = 0;
};

// Whom a rank waits for. Patiently: for work that the first rank does for all, which may take any time.
enum class Waiting { kNo, kForOthers, kPatiently };

// Keys: beat/RANK {"beat", "step", "phase", "place", "waiting", "done"}, "failure" the first rank's own error,
// "verdict" what all say.
class Watch {
 public:
  // `on_abort`: see World. Heartbeats begin at once: twice a second, and with each at().
  Watch(int rank, int size, double timeout_s, std::unique_ptr<TextStore> store,
        std::function<void(const std::string&)> on_abort);
  // The last heartbeat says that this rank is done: it is missed by nobody.
  ~Watch();

  void at(int64_t step, const char* phase);
  void set_waiting(Waiting waiting);
  std::string where() const;  // "step 12, backward"

  // Runs on the watching thread; called by it twice a second.
  void look_around();

 private:
  struct Seen {
    int64_t beat = -1, place = -1;
    Waiting waiting = Waiting::kNo;
    std::chrono::steady_clock::time_point beat_at, place_at, waiting_at;  // when each was last seen to change
    Json json;
  };
  void run();
  void beat(bool done);
  void judge(int first, int last);
  std::string everybody() const;  // where each rank is, a line each

  const int rank_, size_;
  const double timeout_s_;
  const std::unique_ptr<TextStore> store_;
  const std::function<void(const std::string&)> on_abort_;
  std::atomic<int64_t> step_ = 0, place_ = 0, beats_ = 0;
  std::atomic<const char*> phase_ = "starting";
  std::atomic<Waiting> waiting_ = Waiting::kNo;
  std::vector<Seen> seen_;
  bool all_here_ = false;
  std::optional<std::chrono::steady_clock::time_point> doomed_at_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false, moved_ = false;
  std::thread thread_;  // last: it uses all of the above
};

// Of a heartbeat: "step 12, backward".
std::string place_of(const Json& beat);

// For a rank that lost contact: the failure or verdict that is there or comes within two seconds, else which
// ranks' hearts have stopped.
std::string find_cause(TextStore& store, int rank, int size);

}  // namespace caldera
