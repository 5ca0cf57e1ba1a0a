#include "train/distributed/watch.h"

#include <fmt/format.h>

#include <algorithm>

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// How long a process that is to end may take to do so by itself.
constexpr double kGraceSeconds = 3;

std::vector<std::string> beat_keys(int first, int last) {
  std::vector<std::string> keys;
  for (int r = first; r < last; ++r) keys.push_back(fmt::format("beat/{}", r));
  return keys;
}

}  // namespace

std::string place_of(const Json& beat) {
  return fmt::format("step {}, {}", beat.value("step", int64_t{0}), beat.value("phase", std::string("?")));
}

Watch::Watch(int rank, int size, double timeout_s, std::unique_ptr<TextStore> store,
             std::function<void(const std::string&)> on_abort)
    : rank_(rank),
      size_(size),
      timeout_s_(timeout_s),
      store_(std::move(store)),
      on_abort_(std::move(on_abort)),
      seen_(static_cast<size_t>(size)) {
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
  step_ = step;
  phase_ = phase;
  ++place_;
  {
    const std::lock_guard lock(mutex_);
    moved_ = true;
  }
  wake_.notify_all();
}

// A wait that ends is headway, as a new phase is: a long phase has many.
void Watch::set_waiting(Waiting waiting) {
  waiting_ = waiting;
  if (waiting == Waiting::kNo) ++place_;
}

std::string Watch::where() const { return fmt::format("step {}, {}", step_.load(), phase_.load()); }

void Watch::beat(bool done) {
  store_->set(fmt::format("beat/{}", rank_), json_line({{"beat", beats_++},
                                                        {"step", step_.load()},
                                                        {"phase", phase_.load()},
                                                        {"place", place_.load()},
                                                        {"waiting", static_cast<int>(waiting_.load())},
                                                        {"done", done}}));
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
    try {
      beat(false);
      answered_at = Clock::now();
      if (seconds_since(looked_at) < 0.5) continue;
      looked_at = Clock::now();
      look_around();
    } catch (const std::exception& error) {
      // The store is gone: with it rank 0, or the launcher.
      if (seconds_since(answered_at) > kGraceSeconds)
        on_abort_(fmt::format(
            "rank {} ({}): the store of the run no longer answers: rank 0 or the launcher has gone", rank_,
            where()));
    }
  }
}

void Watch::look_around() {
  if (doomed_at_) {
    if (seconds_since(*doomed_at_) < kGraceSeconds) return;
    on_abort_(store_->find("verdict").value_or(store_->find("failure").value_or("another rank failed")));
  }
  if (store_->find("verdict") || store_->find("failure")) {
    doomed_at_ = Clock::now();
    return;
  }
  // Rank 0 watches all, rank 1 watches rank 0.
  if (rank_ == 0) judge(0, size_);
  if (rank_ == 1) judge(0, 1);
}

void Watch::judge(int first, int last) {
  const std::vector<std::string> keys = beat_keys(first, last);
  if (!all_here_) {
    for (const std::string& key : keys)
      if (!store_->find(key)) return;
    all_here_ = true;
  }
  const std::vector<std::string> beats = store_->get_all(keys);
  const Clock::time_point now = Clock::now();
  int64_t num_waiting = 0;
  Clock::time_point waited_from = now;
  for (size_t i = 0; i < beats.size(); ++i) {
    Seen& seen = seen_[static_cast<size_t>(first) + i];
    seen.json = Json::parse(beats[i], nullptr, /*allow_exceptions=*/false);
    if (!seen.json.is_object()) continue;
    const auto beat = seen.json.value("beat", int64_t{0}), place = seen.json.value("place", int64_t{0});
    if (beat != seen.beat) seen.beat_at = now;
    const auto waiting = static_cast<Waiting>(seen.json.value("waiting", 0));
    if (place != seen.place) seen.place_at = now;
    if (place != seen.place || waiting != seen.waiting) seen.waiting_at = now;
    seen.beat = beat;
    seen.place = place;
    seen.waiting = waiting;
    if (waiting != Waiting::kForOthers) continue;
    ++num_waiting;
    waited_from = std::min(waited_from, seen.waiting_at);
  }
  for (int r = first; r < last; ++r) {
    const Seen& seen = seen_[static_cast<size_t>(r)];
    if (r == rank_ || seen.beat < 0 || seen.json.value("done", false)) continue;
    if (const double silent = seconds_since(seen.beat_at); silent > timeout_s_) {
      store_->set_once(
          "verdict",
          fmt::format("rank {} has given no sign of life for {:.0f} s (stopped or dead), last at {}\n{}", r,
                      silent, place_of(seen.json), everybody()));
      return;
    }
  }
  // Somebody waits, and the one who does not wait makes no headway. What nobody waits for may take as long as it does, so
  // the time counts from the wait on.
  for (int r = first; r < last && num_waiting > 0; ++r) {
    const Seen& seen = seen_[static_cast<size_t>(r)];
    if (seen.beat < 0 || seen.waiting != Waiting::kNo || seen.json.value("done", false)) continue;
    if (const double stuck = seconds_since(std::max(seen.place_at, waited_from)); stuck > timeout_s_) {
      store_->set_once(
          "verdict", fmt::format("rank {} is stuck: for {:.0f} s at {}, while {} wait\n{}", r, stuck,
                                 place_of(seen.json), num_waiting == 1 ? "another has to" : "others have to",
                                 everybody()));
      return;
    }
  }
}

std::string Watch::everybody() const {
  std::string text = "where each rank is:";
  for (size_t r = 0; r < seen_.size() && r < 64; ++r) {
    if (seen_[r].beat < 0) continue;
    text += fmt::format("\n  rank {}: {}{}, no headway for {:.1f} s, last heard of {:.1f} s ago", r,
                        place_of(seen_[r].json),
                        seen_[r].waiting == Waiting::kForOthers   ? " (waiting for others)"
                        : seen_[r].waiting == Waiting::kPatiently ? " (waiting for the first)"
                                                                  : "",
                        seconds_since(seen_[r].place_at), seconds_since(seen_[r].beat_at));
  }
  return text;
}

std::string find_cause(TextStore& store, int rank, int size) {
  const auto known = [&]() -> std::optional<std::string> {
    if (auto failure = store.find("failure")) return failure;
    return store.find("verdict");
  };
  const std::vector<std::string> keys = beat_keys(0, size), before = store.get_all(keys);
  for (int i = 0; i < 20; ++i) {
    if (auto text = known()) return *text;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  const std::vector<std::string> after = store.get_all(keys);
  std::vector<std::string> silent;
  for (size_t r = 0; r < after.size(); ++r) {
    const Json beat = Json::parse(after[r], nullptr, /*allow_exceptions=*/false);
    if (static_cast<int>(r) == rank || !beat.is_object()) continue;
    if (beat.value("done", false))
      silent.push_back(fmt::format("rank {} has left early, at {}", r, place_of(beat)));
    else if (before[r] == after[r])
      silent.push_back(fmt::format("rank {} has died without a word, last at {}", r, place_of(beat)));
  }
  const std::string text = silent.empty() ? "a connection between ranks broke though all of them live"
                                          : fmt::format("{}", fmt::join(silent, "; "));
  return store.set_once("verdict", text);
}

}  // namespace caldera
