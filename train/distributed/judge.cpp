#include "train/distributed/judge.h"

#include <fmt/format.h>

#include <algorithm>

namespace caldera {
namespace {

constexpr auto kSavingLane = static_cast<size_t>(Lane::kSaving);

// Of a heartbeat, which comes from another process: 0 or "" where it has no such thing.
int64_t number_in(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_number_integer() ? found->get<int64_t>() : 0;
}
std::string text_in(const Json& json, const char* key) {
  const auto found = json.find(key);
  return found != json.end() && found->is_string() ? found->get<std::string>() : "";
}
LaneState state_in(const Json& json) {
  const int64_t state = number_in(json, "state");
  return state == 1 ? LaneState::kWorking : state == 2 ? LaneState::kWaiting : LaneState::kOff;
}

}  // namespace

std::string name_of(int rank, const std::string& host) {
  return host.empty() ? fmt::format("rank {}", rank) : fmt::format("rank {} ({})", rank, host);
}

std::string name_of_beat(int rank, const Json& beat) { return name_of(rank, text_in(beat, "host")); }

std::string place_of(const Json& beat) {
  return fmt::format("step {}, {}", number_in(beat, "step"), text_in(beat, "phase"));
}

std::optional<std::string> Judge::look(const std::vector<std::string>& beats, double elapsed_s) {
  // Of a longer pause this process was stopped itself, or cut off from the store: the others' heartbeats may
  // still be on their way.
  constexpr double kLongest = 1;
  now_ += std::min(elapsed_s, kLongest);
  seen_.resize(std::max(seen_.size(), beats.size()));
  for (size_t r = 0; r < beats.size(); ++r) read(static_cast<int>(r), beats[r]);
  std::optional<std::string> verdict = silent();
  for (size_t lane = 0; lane < kNumLanes && !verdict; ++lane) verdict = stuck(lane);
  return verdict ? std::optional(*verdict + "\n" + everybody()) : std::nullopt;
}

void Judge::read(int rank, const std::string& text) {
  const Json json = json_or_null(text);
  if (!json.is_object()) return;
  Seen& seen = seen_[static_cast<size_t>(rank)];
  seen.is_here = true;
  seen.is_done = json.value("done", Json()) == true;
  seen.name = name_of_beat(rank, json);
  if (const int64_t beat = number_in(json, "beat"); beat != seen.beat) {
    seen.beat = beat;
    seen.beat_at = now_;
  }
  for (size_t i = 0; i < kNumLanes; ++i) {
    const Json part = i == kSavingLane ? json.value("saving", Json()) : json;
    LaneSeen& lane = seen.lanes[i];
    const LaneState state = state_in(part);
    const int64_t place = number_in(part, "place");
    if (place != lane.place) lane.headway_at = now_;
    if (place != lane.place || state != lane.state) lane.changed_at = now_;
    lane = {state, place, lane.headway_at, lane.changed_at, place_of(part)};
  }
}

std::optional<std::string> Judge::silent() const {
  for (const Seen& seen : seen_) {
    if (!seen.is_here || seen.is_done || now_ - seen.beat_at <= timeout_s_) continue;
    return fmt::format("{} has given no sign of life for {:.0f} s (stopped or dead), last at {}", seen.name,
                       now_ - seen.beat_at, seen.lanes.front().where);
  }
  return std::nullopt;
}

// Somebody waits, and one who does not makes no headway. What nobody waits for may take as long as it does,
// so the time counts from the wait on.
std::optional<std::string> Judge::stuck(size_t lane) const {
  int64_t num_waiting = 0;
  double waited_from = now_;
  for (const Seen& seen : seen_) {
    if (!seen.is_here || seen.is_done || seen.lanes[lane].state != LaneState::kWaiting) continue;
    ++num_waiting;
    waited_from = std::min(waited_from, seen.lanes[lane].changed_at);
  }
  for (const Seen& seen : seen_) {
    if (num_waiting == 0 || !seen.is_here || seen.is_done) continue;
    // Who is not in this lane has yet to come to it, or has yet to come back: what counts is what it does
    // meanwhile.
    const bool is_off = seen.lanes[lane].state == LaneState::kOff;
    const LaneSeen& at = seen.lanes[is_off ? kNumLanes - 1 - lane : lane];
    const double stuck_s = now_ - std::max(at.headway_at, waited_from);
    if (at.state != LaneState::kWorking || stuck_s <= timeout_s_) continue;
    return fmt::format("{} is stuck: for {:.0f} s at {}, while {} to wait", seen.name, stuck_s, at.where,
                       num_waiting == 1 ? "another has" : "others have");
  }
  return std::nullopt;
}

std::string Judge::everybody() const {
  const auto describe = [this](const LaneSeen& lane) {
    return fmt::format("{}{}, no headway for {:.1f} s", lane.where,
                       lane.state == LaneState::kWaiting ? " (waiting for others)" : "",
                       now_ - lane.headway_at);
  };
  std::string text = "where each rank is:";
  for (size_t r = 0; r < seen_.size() && r < 64; ++r) {
    if (!seen_[r].is_here) continue;
    text += fmt::format("\n  {}: ", seen_[r].name);
    const std::array<LaneSeen, kNumLanes>& lanes = seen_[r].lanes;
    if (lanes[0].state != LaneState::kOff) text += describe(lanes[0]) + ", ";
    if (lanes[kSavingLane].state != LaneState::kOff) text += describe(lanes[kSavingLane]) + ", ";
    text += fmt::format("last heard of {:.1f} s ago", now_ - seen_[r].beat_at);
  }
  return text;
}

}  // namespace caldera
