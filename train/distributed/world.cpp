#include "train/distributed/world.h"

#define USE_C10D_GLOO 1
#include <dlfcn.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/fault.h"
#include "base/files.h"
#include "model/ops/streams.h"
#include "train/distributed/nccl_module.h"
#include "train/distributed/store_host.h"
#include "train/distributed/watch.h"

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;

std::vector<uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }
std::string text_of(const std::vector<uint8_t>& bytes) { return {bytes.begin(), bytes.end()}; }

// One connection to the store. c10d locks each call; none of those here waits for a key.
class C10dStore : public TextStore {
 public:
  explicit C10dStore(c10::intrusive_ptr<c10d::Store> store) : store_(std::move(store)) {}
  void set(const std::string& key, const std::string& value) override { store_->set(key, bytes_of(value)); }
  std::optional<std::string> find(const std::string& key) override {
    if (!store_->check({key})) return std::nullopt;
    return text_of(store_->get(key));
  }
  std::vector<std::string> get_all(const std::vector<std::string>& keys) override {
    std::vector<std::string> values;
    for (const auto& value : store_->multiGet(keys)) values.push_back(text_of(value));
    return values;
  }
  std::string set_once(const std::string& key, const std::string& value) override {
    return text_of(store_->compareSet(key, {}, bytes_of(value)));
  }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
};

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

// Texts in one: each as "LENGTH:BYTES".
std::string pack_texts(const std::vector<std::string>& texts) {
  std::string packed;
  for (const std::string& text : texts) packed += fmt::format("{}:{}", text.size(), text);
  return packed;
}
std::vector<std::string> unpack_texts(const std::string& packed) {
  std::vector<std::string> texts;
  for (size_t at = 0; at < packed.size();) {
    const size_t colon = packed.find(':', at), length = std::stoull(packed.substr(at, colon - at));
    texts.push_back(packed.substr(colon + 1, length));
    at = colon + 1 + length;
  }
  return texts;
}

// For one of `size` ranks, which are all on this machine or not.
c10::intrusive_ptr<c10d::Backend> make_backend(const c10::intrusive_ptr<c10d::Store>& store, int rank,
                                               int size, bool is_local, at::Device device,
                                               std::chrono::milliseconds timeout) {
  if (device.is_cuda()) {
    const std::string file = (fs::read_symlink("/proc/self/exe").parent_path() / "libcaldera_nccl.so").string();
    void* const library = ::dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL);
    CALDERA_CHECK(library != nullptr, DistributedError,
                  "several ranks on GPUs need NCCL, and its part of this program does not open: {}; it is built where "
                  "NCCL's headers are, and belongs beside the program",
                  ::dlerror());
    c10::intrusive_ptr<c10d::Backend> group;
    reinterpret_cast<decltype(&caldera_make_nccl_group)>(::dlsym(library, "caldera_make_nccl_group"))(
        store, rank, size, device, timeout, group);
    return group;
  }
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  // The machine's own name may lead nowhere; where all ranks are on one machine the loop-back is right.
  const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
  options->devices.push_back(interface != nullptr
                                 ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                             : is_local ? c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1")
                                        : c10d::ProcessGroupGloo::createDefaultDevice());
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, size, options);
}

}  // namespace

struct World::Group {
  std::string backend_name;
  c10::intrusive_ptr<c10d::Store> store;
  std::unique_ptr<C10dStore> texts;
  std::unique_ptr<Watch> watch;
  std::array<c10::intrusive_ptr<c10d::Backend>, 3> backends;  // by Among; none where it was not asked for
  at::Device device = at::kCPU;
  std::chrono::milliseconds timeout{};
  std::mutex mutex;
  std::map<std::string, int64_t> num_exchanges;  // by channel
  std::exception_ptr own_error;                  // what this rank told the others
  bool has_failed = false;                       // and the others were told
  std::atomic<bool> is_broken = false;           // a collective or exchange failed: no farewell

  std::string await(const std::string& key, std::optional<Clock::time_point> deadline);
  void connect(Among among, const std::string& name, int rank, int size, bool is_local) {
    backends[static_cast<size_t>(among)] = make_backend(c10::make_intrusive<c10d::PrefixStore>(name, store),
                                                        rank, size, is_local, device, timeout);
  }
  c10d::Backend& backend(Among among) const {
    CALDERA_ASSERT(backends[static_cast<size_t>(among)] != nullptr);
    return *backends[static_cast<size_t>(among)];
  }
};

// The key's text once it is there; another rank's failure ends the wait.
std::string World::Group::await(const std::string& key, std::optional<Clock::time_point> deadline) {
  for (auto pause = std::chrono::milliseconds(1);;
       pause = std::min(2 * pause, std::chrono::milliseconds(32))) {
    if (auto text = texts->find(key)) return *text;
    for (const char* cause : {"failure", "verdict"}) {
      if (const auto text = texts->find(cause)) {
        is_broken = true;
        throw PeerError(*text);
      }
    }
    CALDERA_CHECK(!deadline || Clock::now() < *deadline, DistributedError, "no word from {} in time", key);
    std::this_thread::sleep_for(pause);
  }
}

World& World::alone() {
  static World world;
  return world;
}

World::World(const WorldSpec& spec, at::Device device, double timeout_s,
             std::function<void(const std::string&)> on_abort)
    : spec_(spec), timeout_s_(timeout_s) {
  set_fault_rank(spec.rank, spec.attempt);
  if (spec.size == 1 && !spec.group_of_one) return;
  survive_broken_connections();
  const auto timeout = std::chrono::milliseconds(static_cast<int64_t>(timeout_s * 1000));
  group_ = std::make_unique<Group>();
  group_->backend_name = device.is_cuda() ? "nccl" : "gloo";
  group_->device = device;
  const std::string prefix = fmt::format("caldera/{}", spec.attempt);
  const auto connect = [&](bool is_server) {
    c10d::TCPStoreOptions options;
    options.port = static_cast<uint16_t>(spec.port);
    options.isServer = is_server;
    options.waitWorkers = false;
    options.timeout = timeout;
    return c10::make_intrusive<c10d::PrefixStore>(prefix,
                                                  c10::make_intrusive<c10d::TCPStore>(spec.address, options));
  };
  try {
    group_->store = connect(spec.rank == 0 && !spec.store_is_hosted);
    group_->texts = std::make_unique<C10dStore>(group_->store);
    group_->watch = std::make_unique<Watch>(spec.rank, spec.size, timeout_s,
                                            std::make_unique<C10dStore>(connect(false)), std::move(on_abort));
    group_->watch->at(0, "joining");
    exchange("join", "");
    // The watch speaks first: its message says more than the group's own time-out.
    group_->timeout = 2 * timeout;
    group_->connect(Among::kAll, "group", spec.rank, spec.size, spec.local_size == spec.size);
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw DistributedError(fmt::format("rank {} of {} cannot join the others at {}:{}: {}", spec.rank,
                                       spec.size, spec.address, spec.port, first_line(error.what())));
  }
}

World::~World() {
  if (!group_) return;
  // All leave together: rank 0 may host the store. A rank that failed does not wait.
  if (std::uncaught_exceptions() == 0 && !group_->is_broken) {
    try {
      exchange("leave", "");
      // Who reads last must still find the store.
      if (is_first() && !spec_.store_is_hosted) {
        for (int r = 1; r < size(); ++r)
          for (int i = 0; i < 100 && !group_->texts->find(fmt::format("left/{}", r)); ++i)
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
      }
    } catch (const std::exception&) {
      // Those who have gone need no farewell.
    }
  }
  group_->watch.reset();
  try {
    group_->texts->set(fmt::format("left/{}", rank()), "");
  } catch (const std::exception&) {
    // As above.
  }
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
  group_->connect(Among::kMachine, fmt::format("machine/{}", machine), place, local_size, true);
  group_->connect(Among::kPeers, fmt::format("peers/{}", place), machine, size() / local_size, false);
}

// What a collective's caller holds. `tensors` live until it is through.
template <class Start>
Wait World::begin(std::vector<at::Tensor> tensors, const Start& start) {
  if (!group_) return [] {};
  ++num_collectives_;
  num_bytes_ += static_cast<int64_t>(tensors.front().nbytes());
  const auto lost = [this](const std::exception& error) -> PeerError {
    group_->is_broken = true;
    return PeerError(first_line(error.what()));
  };
  try {
    return [this, lost, tensors, work = start()] {
      const Clock::time_point since = Clock::now();
      group_->watch->set_waiting(Waiting::kForOthers);
      try {
        work->wait();
      } catch (const std::exception& error) {
        throw lost(error);
      }
      group_->watch->set_waiting(Waiting::kNo);
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
  group_->watch->set_waiting(Waiting::kForOthers);
  current_stream(group_->device).synchronize();
  group_->watch->set_waiting(Waiting::kNo);
}

double World::take_waited_ms() { return std::exchange(waited_ms_, 0); }

std::vector<std::string> World::exchange(const std::string& channel, const std::string& mine, bool is_patient) {
  if (!group_) return {mine};
  int64_t number = 0;
  {
    const std::lock_guard lock(group_->mutex);
    number = group_->num_exchanges[channel]++;
  }
  const auto key = [&](int64_t n, const std::string& what) {
    return fmt::format("{}/{}/{}", channel, n, what);
  };
  const bool is_training_thread = channel != "save";
  if (is_training_thread)
    group_->watch->set_waiting(is_patient && !is_first() ? Waiting::kPatiently : Waiting::kForOthers);
  const std::optional<Clock::time_point> deadline =
      channel == "join"
          ? std::optional(Clock::now() + std::chrono::milliseconds(static_cast<int64_t>(timeout_s_ * 1000)))
          : std::nullopt;
  std::vector<std::string> all;
  if (is_first()) {
    all.push_back(mine);
    for (int r = 1; r < size(); ++r) all.push_back(group_->await(key(number, std::to_string(r)), deadline));
    group_->texts->set(key(number, "all"), pack_texts(all));
    // Everybody has come this far, so the exchange before has been read by all.
    for (int r = 1; r < size() && number > 0; ++r)
      group_->store->deleteKey(key(number - 1, std::to_string(r)));
    if (number > 0) group_->store->deleteKey(key(number - 1, "all"));
  } else {
    group_->texts->set(key(number, std::to_string(rank())), mine);
    all = unpack_texts(group_->await(key(number, "all"), deadline));
  }
  if (is_training_thread) group_->watch->set_waiting(Waiting::kNo);
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
        fmt::format("rank {} failed at {}: {}", rank(), group_->watch->where(), own.what());
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
    } catch (const std::exception&) {
      cause = "rank 0 has died without a word, and with it the run's store";
    }
    throw PeerError(fmt::format("{} (rank {} noticed at {}: {})", cause, rank(), group_->watch->where(),
                                consequence.what()));
  }
}

}  // namespace caldera
