// Who is to blame when the ranks of a run wait for one another, from their heartbeats alone.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"

namespace caldera {

// What a rank does at the same time: it trains, and writes a checkpoint. Ranks wait for one another in each
// by itself.
enum class Lane { kTraining, kSaving };
constexpr size_t kNumLanes = 2;
// Off: nothing is done there, or (training) its thread is busy in the other lane.
enum class LaneState { kOff, kWorking, kWaiting };

// A rank in messages: "rank 3 (node1)"; "rank 3" where `host` is "".
std::string name_of(int rank, const std::string& host);
// The same of a heartbeat.
std::string name_of_beat(int rank, const Json& beat);
// Where a rank is, of a heartbeat or of its "saving": "step 12, backward".
std::string place_of(const Json& beat);

// A heartbeat is the JSON of {"beat", "host", "done"} and of the training lane's {"step", "phase", "place",
// "state"}, with those of the saving lane as "saving". "beat" and "place" are counters: of heartbeats, and of
// headway.
class Judge {
 public:
  explicit Judge(double timeout_s) : timeout_s_(timeout_s) {}

  // Looks at the heartbeats of ranks 0, 1, ... `elapsed_s` after the look before. A rank is to blame that
  // gave no sign of life for `timeout_s`, or that makes no headway for so long while others wait for it. The
  // verdict, for a person to read.
  std::optional<std::string> look(const std::vector<std::string>& beats, double elapsed_s);

 private:
  struct LaneSeen {
    LaneState state = LaneState::kOff;
    int64_t place = -1;
    double headway_at = 0, changed_at = 0;  // the last headway; the last headway or change of state
    std::string where;
  };
  struct Seen {
    bool is_here = false, is_done = false;
    int64_t beat = -1;
    double beat_at = 0;
    std::string name;
    std::array<LaneSeen, kNumLanes> lanes;
  };
  void read(int rank, const std::string& text);
  std::optional<std::string> silent() const;
  std::optional<std::string> stuck(size_t lane) const;
  std::string everybody() const;  // where each rank is, a line each

  const double timeout_s_;
  double now_ = 0;
  std::vector<Seen> seen_;
};

}  // namespace caldera
