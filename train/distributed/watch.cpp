#include "train/distributed/watch.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// How long a process that is to end may take to do so by itself.
constexpr double kGraceSeconds = 3;

std::string beat_key(int rank) { return fmt::format("beat/{}", rank); }

// "" for a rank that has not come yet.
std::vector<std::string> all_beats(TextStore& store, int size) {
  std::vector<std::string> beats;
  for (int r = 0; r < size; ++r) beats.push_back(store.find(beat_key(r)).value_or(""));
  return beats;
}

}  // namespace

Json Watch::LaneNow::describe() const {
  return {{"step", step.load()},
          {"phase", phase.load()},
          {"place", place.load()},
          {"state", static_cast<int>(state.load())}};
}

Watch::Waits::Waits(Watch& watch, Lane lane)
    : watch_(watch), lane_(lane), before_(watch.lane(lane).state.exchange(LaneState::kWaiting)) {}

Watch::Waits::~Waits() {
  ++watch_.lane(lane_).place;
  watch_.lane(lane_).state = before_;
}

Watch::Watch(const WatchSpec& spec, std::unique_ptr<TextStore> store,
             std::function<void(const std::string&)> on_abort)
    : spec_(spec), store_(std::move(store)), on_abort_(std::move(on_abort)), judge_(spec.timeout_s) {
  lane(Lane::kTraining).state = LaneState::kWorking;
  lane(Lane::kSaving).phase = "saving a checkpoint";
  beat(false);
  thread_ = std::thread([this] { run(); });
}

Watch::~Watch() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  try {
    beat(true);
  } catch (const std::exception&) {
    // The store has gone before: nobody is left to read it.
  }
}

void Watch::at(int64_t step, const char* phase) {
  LaneNow& training = lane(Lane::kTraining);
  training.step = step;
  training.phase = phase;
  ++training.place;
  {
    const std::lock_guard lock(mutex_);
    moved_ = true;
  }
  wake_.notify_all();
}

// One of the two lanes is on at any time, for the rank to be judged by.
void Watch::begin_saving(int64_t step, bool on_training_thread) {
  LaneNow& saving = lane(Lane::kSaving);
  saving.step = step;
  ++saving.place;
  saving.state = LaneState::kWorking;
  if (on_training_thread) lane(Lane::kTraining).state = LaneState::kOff;
}

void Watch::end_saving(bool on_training_thread) {
  if (on_training_thread) {
    ++lane(Lane::kTraining).place;
    lane(Lane::kTraining).state = LaneState::kWorking;
  }
  lane(Lane::kSaving).state = LaneState::kOff;
}

std::string Watch::where() const {
  const LaneNow& training = lane(Lane::kTraining);
  return fmt::format("step {}, {}", training.step.load(), training.phase.load());
}

void Watch::beat(bool done) {
  Json json = lane(Lane::kTraining).describe();
  json["beat"] = beats_++;
  json["host"] = spec_.host;
  json["done"] = done;
  json["saving"] = lane(Lane::kSaving).describe();
  store_->set(beat_key(spec_.rank), json_line(json));
}

void Watch::run() {
  Clock::time_point looked_at = Clock::now(), answered_at = Clock::now();
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      wake_.wait_for(lock, std::chrono::milliseconds(500), [this] { return stop_ || moved_; });
      if (stop_) return;
      moved_ = false;
    }
    std::optional<std::string> end;
    try {
      beat(false);
      answered_at = Clock::now();
      const double elapsed_s = seconds_since(looked_at);
      if (elapsed_s < 0.5) continue;
      looked_at = Clock::now();
      end = look_around(elapsed_s);
    } catch (const StoreGone&) {  // the training thread may know more of that
      if (seconds_since(answered_at) > kGraceSeconds)
        end = fmt::format(
            "{} at {}: the store of the run is gone: the launcher or rank 0, whichever kept it, has ended",
            name_of(spec_.rank, spec_.host), where());
    } catch (const std::exception& error) {  // it does not answer, and all the time there was is over
      end = fmt::format("{} at {}: {}", name_of(spec_.rank, spec_.host), where(), error.what());
    }
    if (!end) continue;
    {
      const std::lock_guard lock(mutex_);
      if (stop_) return;
    }
    return on_abort_(*end);
  }
}

std::optional<std::string> Watch::look_around(double elapsed_s) {
  const std::optional<std::string> failure = store_->find("failure"), verdict = store_->find("verdict");
  if (failure || verdict) {
    if (!doomed_at_) doomed_at_ = Clock::now();
    // This rank's own failure may have a checkpoint to wait for, and knows its exit code.
    const bool is_own = failure && failure->starts_with(name_of(spec_.rank, spec_.host) + " failed at ");
    const double grace_s = is_own ? std::max(kGraceSeconds, spec_.timeout_s) : kGraceSeconds;
    return seconds_since(*doomed_at_) < grace_s ? std::nullopt : verdict ? verdict : failure;
  }
  // Rank 0 watches all, rank 1 watches rank 0.
  if (spec_.rank > 1) return std::nullopt;
  std::vector<std::string> keys;
  for (int r = 0; r < (spec_.rank == 0 ? spec_.size : 1); ++r) keys.push_back(beat_key(r));
  if (!all_here_) {
    for (const std::string& key : keys)
      if (!store_->find(key)) return std::nullopt;
    all_here_ = true;
  }
  if (const auto blame = judge_.look(store_->get_all(keys), elapsed_s)) store_->set_once("verdict", *blame);
  return std::nullopt;
}

std::string find_cause(TextStore& store, int rank, int size) {
  const auto known = [&]() -> std::optional<std::string> {
    if (auto failure = store.find("failure")) return failure;
    return store.find("verdict");
  };
  const std::vector<std::string> before = all_beats(store, size);
  for (int i = 0; i < 20; ++i) {
    if (auto text = known()) return *text;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  const std::vector<std::string> after = all_beats(store, size);
  std::vector<std::string> silent;
  for (size_t r = 0; r < after.size(); ++r) {
    const Json beat = json_or_null(after[r]);
    const auto other = static_cast<int>(r);
    if (other == rank || !beat.is_object()) continue;
    if (beat.value("done", Json()) == true)
      silent.push_back(fmt::format("{} has left early, at {}", name_of_beat(other, beat), place_of(beat)));
    else if (before[r] == after[r])
      silent.push_back(
          fmt::format("{} has died without a word, last at {}", name_of_beat(other, beat), place_of(beat)));
  }
  const std::string text = silent.empty() ? "a connection between ranks broke though all of them live"
                                          : fmt::format("{}", fmt::join(silent, "; "));
  return store.set_once("verdict", text);
}

}  // namespace caldera
