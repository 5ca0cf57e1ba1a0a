#include "train/distributed/world.h"

#include <c10/util/Logging.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "base/fault.h"
#include "base/host.h"
#include "model/ops/streams.h"
#include "train/distributed/backend.h"
#include "train/distributed/packed_texts.h"
#include "train/distributed/watch.h"

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kForever_s = std::numeric_limits<double>::infinity();

Lane lane_of(const std::string& channel) { return channel == "save" ? Lane::kSaving : Lane::kTraining; }

// What a rank tells the others as it joins.
std::string greeting(const std::string& host, const Route& route) {
  return json_line({{"host", host}, {"pid", ::getpid()}, {"address", route.own}, {"peer", route.peer}});
}

}  // namespace

struct World::Group {
  int rank = 0, size = 1;
  std::string name;  // of this rank, in messages
  std::string backend_name;
  c10::intrusive_ptr<c10d::Store> hosted;  // by this rank
  c10::intrusive_ptr<c10d::Store> store;
  std::unique_ptr<TextStore> texts;
  std::unique_ptr<Watch> watch;
  std::thread::id training_thread = std::this_thread::get_id();
  std::optional<HeadwayScope> headway;                        // of the training thread
  std::array<c10::intrusive_ptr<c10d::Backend>, 3> backends;  // by Among; none where it was not asked for
  at::Device device = at::kCPU;
  std::string machine, address;  // this machine's name, and what the others reach it by
  std::chrono::milliseconds timeout{};
  std::mutex mutex;
  std::map<std::string, int64_t> num_exchanges;  // by channel
  std::exception_ptr own_error;                  // what this rank told the others
  bool has_failed = false;                       // and the others were told
  std::atomic<bool> is_broken = false;           // a collective or exchange failed: no farewell

  ~Group();
  // With the store; that it does not answer is told with this rank's name and place.
  template <class Call>
  auto talk(const Call& call) {
    try {
      return call(*texts);
    } catch (const StoreGone& error) {
      is_broken = true;
      throw PeerError(error.what());
    } catch (const StoreError& error) {
      is_broken = true;
      throw DistributedError(fmt::format("{} at {}: {}", name, where(), error.what()));
    }
  }
  std::optional<std::string> find(const std::string& key) {
    return talk([&](TextStore& to) { return to.find(key); });
  }
  void set(const std::string& key, const std::string& text) {
    talk([&](TextStore& to) { to.set(key, text); });
  }
  void remove(const std::string& key) {
    talk([&](TextStore& to) { to.remove(key); });
  }
  std::optional<std::string> await(const std::string& key, double limit_s = kForever_s);
  std::string where() const { return watch ? watch->where() : "step 0, joining"; }
  void connect(Among among, const std::string& prefix, int place, int num_places,
               const std::string& own_address) {
    const Watch::Waits waits(*watch, Lane::kTraining);
    backends[static_cast<size_t>(among)] =
        make_backend({.rank = place,
                      .size = num_places,
                      .device = device,
                      .machine = machine,
                      .address = own_address,
                      .timeout = timeout},
                     c10::make_intrusive<c10d::PrefixStore>(prefix, store));
  }
  c10d::Backend& backend(Among among) const {
    CALDERA_ASSERT(backends[static_cast<size_t>(among)] != nullptr);
    return *backends[static_cast<size_t>(among)];
  }
};

// The connections first: whoever waits at one learns by that. Then the store, which others read why this rank
// left from.
World::Group::~Group() {
  for (auto& backend : backends) backend.reset();
  headway.reset();
  watch.reset();
  try {
    const auto key = [](int other) { return fmt::format("left/{}", other); };
    if (texts) texts->set(key(rank), "");
    const Clock::time_point deadline = Clock::now() + std::chrono::seconds(2);
    for (int r = 0; r < size && texts && hosted; ++r)
      while (!texts->find(key(r)) && Clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
  } catch (const std::exception&) {
    // The store is gone, and with it whoever would read it.
  }
}

// The key's text once it is there; none where it does not come within `limit_s`. Another rank's failure ends
// the wait.
std::optional<std::string> World::Group::await(const std::string& key, double limit_s) {
  const Clock::time_point since = Clock::now();
  for (auto pause = std::chrono::milliseconds(1);;
       pause = std::min(2 * pause, std::chrono::milliseconds(32))) {
    if (auto text = find(key)) return text;
    for (const char* cause : {"failure", "verdict"}) {
      if (const auto text = find(cause)) {
        is_broken = true;
        throw PeerError(*text);
      }
    }
    if (std::chrono::duration<double>(Clock::now() - since).count() >= limit_s) return std::nullopt;
    std::this_thread::sleep_for(pause);
  }
}

void quiet_c10d() {
  static const bool is_done [[maybe_unused]] = [] {  // once: threads of c10d may read it by now
    if (std::getenv("TORCH_CPP_LOG_LEVEL") != nullptr)
      c10::initLogging();  // which reads it
    else
      FLAGS_caffe2_log_level = c10::GLOG_FATAL;
    return true;
  }();
}

World::World() : hosts_{host_name()} {}

World& World::alone() {
  static World world;
  return world;
}

World::World(const WorldSpec& spec, at::Device device, double timeout_s,
             std::function<void(const std::string&)> on_abort)
    : spec_(spec), timeout_s_(timeout_s), hosts_(static_cast<size_t>(spec.size)) {
  const std::string& machine = hosts_[static_cast<size_t>(spec.rank)] = host_name();
  set_fault_rank(spec.rank, spec.attempt);
  if (spec.size == 1 && !spec.group_of_one) return;
  survive_broken_connections();
  quiet_c10d();
  group_ = std::make_unique<Group>();
  group_->rank = spec.rank;
  group_->size = spec.size;
  group_->name = who(spec.rank);
  group_->machine = machine;
  group_->backend_name = device.is_cuda() ? "nccl" : "gloo";
  group_->device = device;
  try {
    connect(fmt::format("caldera/{}", spec.attempt), std::move(on_abort));
  } catch (const PeerError&) {
    throw;
  } catch (const std::exception& error) {
    const DistributedError own(fmt::format("cannot join the others as rank {} of {}: {}", spec.rank,
                                           spec.size, without_trace(error)));
    if (!group_->texts) throw own;
    fail(std::make_exception_ptr(own));
  }
}

void World::connect(const std::string& prefix, std::function<void(const std::string&)> on_abort) {
  StoreAddress address{spec_.address, spec_.port, run_secret()};
  const bool is_local = spec_.local_size == spec_.size;
  if (is_local && !spec_.store_is_hosted) address.host = "127.0.0.1";
  if (is_first() && !spec_.store_is_hosted) group_->hosted = host_store(address, is_local, timeout_s_);
  group_->texts = connect_store(address, prefix, timeout_s_);
  group_->watch = std::make_unique<Watch>(
      WatchSpec{
          .rank = rank(), .size = size(), .host = is_local ? "" : group_->machine, .timeout_s = timeout_s_},
      connect_store(address, prefix, timeout_s_), std::move(on_abort));
  group_->headway.emplace(group_->watch->headway(Lane::kTraining));
  at(0, "joining");
  const Route own = is_local ? Route{"127.0.0.1", "127.0.0.1"} : route_to(address.host, address.port);
  std::vector<Route> routes;
  for (const std::string& text : join(greeting(group_->machine, own))) {
    const Json other = parse_json(text, "what a rank said as it joined");
    hosts_.at(routes.size()) = other.value("host", "?");
    routes.push_back({other.value("address", ""), other.value("peer", "")});
  }
  group_->address = address_among(routes, rank());
  group_->store = connect_c10d_store(address, prefix, timeout_s_);
  // The watch speaks first: its message says more than the group's own time-out.
  group_->timeout = 2 * std::chrono::milliseconds(static_cast<int64_t>(timeout_s_ * 1000));
  group_->connect(Among::kAll, "group", rank(), size(), group_->address);
}

// An exchange with an end: who has not come by then is missing.
std::vector<std::string> World::join(const std::string& mine) {
  const Watch::Waits waits(*group_->watch, Lane::kTraining);
  const auto key = [](int r) { return fmt::format("join/{}", r); };
  // The first to say so says it for all.
  const auto give_up = [this](std::string text) {
    if (group_->texts->num_rejected() > 0)
      text +=
          "; values signed with another secret were seen: is CALDERA_RUN_SECRET the same on all machines?";
    group_->is_broken = true;
    throw PeerError(group_->texts->set_once("failure", text));
  };
  if (!is_first()) {
    group_->set(key(rank()), mine);
    auto all = group_->await("join/all", timeout_s_);
    // The first rank may have come late, and now waits for the others as long.
    if (!all && group_->find(key(0))) all = group_->await("join/all", timeout_s_);
    if (!all)
      give_up(fmt::format(
          "{} has waited for {:.0f} s: rank 0 has not come within that time; start it, or give it more "
          "time (distributed.timeout_s)",
          group_->name, timeout_s_));
    return unpack_texts(*all);
  }
  group_->set(key(0), mine);
  const Clock::time_point since = Clock::now();
  std::vector<std::string> all = {mine};
  std::vector<int> missing;
  for (int r = 1; r < size(); ++r) {
    const double waited_s = std::chrono::duration<double>(Clock::now() - since).count();
    if (const auto text = group_->await(key(r), timeout_s_ - waited_s))
      all.push_back(*text);
    else
      missing.push_back(r);
  }
  if (!missing.empty()) {
    const bool is_one = missing.size() == 1;
    give_up(fmt::format(
        "only {} of {} ranks have come within {:.0f} s: rank{} {} {} missing; start {}, or give {} more time "
        "(distributed.timeout_s)",
        all.size(), size(), timeout_s_, is_one ? "" : "s", fmt::join(missing, ", "), is_one ? "is" : "are",
        is_one ? "it" : "them", is_one ? "it" : "them"));
  }
  group_->set("join/all", pack_texts(all));
  return all;
}

World::~World() {
  if (!group_) return;
  // All leave together. A rank that failed does not wait.
  if (std::uncaught_exceptions() == 0 && !group_->is_broken) {
    try {
      exchange("leave", "");
    } catch (const std::exception&) {
      // Those who have gone need no farewell.
    }
  }
}

std::string World::who(int rank) const {
  const bool is_one_machine = spec_.local_size == spec_.size;
  return name_of(rank, is_one_machine ? "" : hosts_[static_cast<size_t>(rank)]);
}

std::string World::describe() const {
  if (!group_) return "1 process";
  const int machines = (size() + spec_.local_size - 1) / spec_.local_size;
  return fmt::format("{} rank{} on {} machine{}, {}, started by {}{}", size(), size() == 1 ? "" : "s", machines,
                     machines == 1 ? "" : "s", group_->backend_name, spec_.started_by,
                     spec_.attempt > 0 ? fmt::format(", attempt {}", spec_.attempt + 1) : "");
}

void World::split_by_machine() {
  if (group_->backends[static_cast<size_t>(Among::kMachine)]) return;  // by an earlier stage
  const int local_size = spec_.local_size;
  bool is_even = true;
  std::vector<std::string> places;
  for (const std::string& place : exchange("main", fmt::format("{} of {}", spec_.local_rank, local_size))) {
    is_even =
        is_even && place == fmt::format("{} of {}", static_cast<int>(places.size()) % local_size, local_size);
    places.push_back(place);
  }
  CALDERA_CHECK(
      is_even && size() % local_size == 0, ConfigError,
      "distributed.shard_within node needs as many ranks on every machine, numbered machine by machine; "
      "got, by rank, the local ranks {}",
      fmt::join(places, ", "));
  if (local_size == 1 || local_size == size()) return;
  const int machine = rank() / local_size, place = spec_.local_rank;
  group_->connect(Among::kMachine, fmt::format("machine/{}", machine), place, local_size, "127.0.0.1");
  group_->connect(Among::kPeers, fmt::format("peers/{}", place), machine, size() / local_size,
                  group_->address);
}

// What a collective's caller holds. `tensors` live until it is through.
template <class Start>
Wait World::begin(std::vector<at::Tensor> tensors, const Start& start) {
  if (!group_) return [] {};
  ++num_collectives_;
  num_bytes_ += static_cast<int64_t>(tensors.front().nbytes());
  const auto lost = [this](const std::exception& error) -> PeerError {
    group_->is_broken = true;
    return PeerError(without_trace(error));
  };
  try {
    return [this, lost, tensors, work = start()] {
      const Clock::time_point since = Clock::now();
      const Watch::Waits waits(*group_->watch, Lane::kTraining);
      try {
        work->wait();
      } catch (const std::exception& error) {
        throw lost(error);
      }
      waited_ms_ += std::chrono::duration<double, std::milli>(Clock::now() - since).count();
    };
  } catch (const std::exception& error) {
    throw lost(error);
  }
}

Wait World::sum(at::Tensor tensor, Among among) {
  return begin({tensor}, [&] {
    std::vector<at::Tensor> tensors = {tensor};
    return group_->backend(among).allreduce(tensors);
  });
}

Wait World::reduce_scatter(at::Tensor out, at::Tensor in, Among among) {
  return begin({in, out}, [&] { return group_->backend(among)._reduce_scatter_base(out, in); });
}

Wait World::all_gather(at::Tensor out, at::Tensor in, Among among) {
  return begin({out, in}, [&] { return group_->backend(among)._allgather_base(out, in); });
}

void World::wait_for_device() {
  if (!group_ || group_->device.is_cpu()) return;
  const Watch::Waits waits(*group_->watch, Lane::kTraining);
  current_stream(group_->device).synchronize();
}

double World::take_waited_ms() { return std::exchange(waited_ms_, 0); }

std::vector<std::string> World::exchange(const std::string& channel, const std::string& mine) {
  if (!group_) return {mine};
  int64_t number = 0;
  {
    const std::lock_guard lock(group_->mutex);
    number = group_->num_exchanges[channel]++;
  }
  const auto key = [&](int64_t n, const std::string& what) {
    return fmt::format("{}/{}/{}", channel, n, what);
  };
  const Watch::Waits waits(*group_->watch, lane_of(channel));
  if (!is_first()) {
    group_->set(key(number, std::to_string(rank())), mine);
    return unpack_texts(*group_->await(key(number, "all")));
  }
  std::vector<std::string> all = {mine};
  for (int r = 1; r < size(); ++r) all.push_back(*group_->await(key(number, std::to_string(r))));
  group_->set(key(number, "all"), pack_texts(all));
  // Everybody has come this far, so the exchange before has been read by all.
  for (int r = 1; r < size() && number > 0; ++r) group_->remove(key(number - 1, std::to_string(r)));
  if (number > 0) group_->remove(key(number - 1, "all"));
  return all;
}

void World::at(int64_t step, const char* phase) {
  if (group_) group_->watch->at(step, phase);
}

void World::tell(std::exception_ptr error) {
  if (!group_) return;
  bool is_first_failure = true;
  try {
    std::rethrow_exception(error);
  } catch (const PeerError&) {
    return;
  } catch (const std::exception& own) {
    const std::string text =
        fmt::format("{} failed at {}: {}", who(rank()), group_->where(), without_trace(own));
    try {
      is_first_failure = group_->texts->set_once("failure", text) == text;
    } catch (const std::exception&) {
      // Without the store the others find out by the broken connections.
    }
  }
  const std::lock_guard lock(group_->mutex);
  if (is_first_failure && !group_->own_error) group_->own_error = error;
}

void World::fail(std::exception_ptr error) {
  if (!group_ || std::exchange(group_->has_failed, true)) std::rethrow_exception(error);
  group_->is_broken = true;
  tell(error);
  {
    // The error that was there first, of a save in the background maybe: what came of it is no news.
    const std::lock_guard lock(group_->mutex);
    if (group_->own_error) std::rethrow_exception(group_->own_error);
  }
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& consequence) {
    std::string cause;
    try {
      cause = find_cause(*group_->texts, rank(), size());
    } catch (const DistributedError& silence) {
      cause = silence.what();
    } catch (const std::exception&) {
      cause = spec_.store_is_hosted ? "the run's store is gone: the launcher that kept it has ended"
                                    : "rank 0 has died without a word, and with it the run's store";
    }
    const std::string own = without_trace(consequence);
    throw PeerError(fmt::format("{} ({} noticed at {}{})", cause, who(rank()), group_->where(),
                                own == cause ? "" : ": " + own));
  }
}

SavingLane::SavingLane(World& world, int64_t step) : world_(world) {
  if (!world_.group_) return;
  on_training_thread_ = std::this_thread::get_id() == world_.group_->training_thread;
  headway_.emplace(world_.group_->watch->headway(Lane::kSaving));
  world_.group_->watch->begin_saving(step, on_training_thread_);
}

SavingLane::~SavingLane() {
  if (world_.group_) world_.group_->watch->end_saving(on_training_thread_);
}

}  // namespace caldera
