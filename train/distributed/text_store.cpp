#include "train/distributed/text_store.h"

#include <c10/util/hash.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <mutex>
#include <queue>
#include <thread>

#include "base/error.h"

namespace caldera {
namespace {

using C10dStore = c10::intrusive_ptr<c10d::Store>;

constexpr size_t kSignatureDigits = 40;

std::vector<uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }
std::string text_of(const std::vector<uint8_t>& bytes) { return {bytes.begin(), bytes.end()}; }
std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
}

// A thread that does one thing after the other, and may be left behind in one that does not end.
class Worker {
 public:
  Worker() : thread_([jobs = jobs_] { jobs->run(); }) {}
  ~Worker() {
    jobs_->stop();
    is_stuck_ ? thread_.detach() : thread_.join();
  }
  // What `work` returns or throws; none where it takes longer than that. `work` owns all that it uses.
  template <class Work>
  auto run(Work work, double timeout_s) -> std::optional<decltype(work())> {
    if (is_stuck_) return std::nullopt;
    const auto task = std::make_shared<std::packaged_task<decltype(work())()>>(std::move(work));
    auto result = task->get_future();
    jobs_->add([task] { (*task)(); });
    if (result.wait_for(milliseconds(timeout_s)) == std::future_status::ready) return result.get();
    is_stuck_ = true;
    return std::nullopt;
  }

 private:
  struct Jobs {
    std::mutex mutex;
    std::condition_variable wake;
    std::queue<std::function<void()>> queue;
    bool is_over = false;

    void add(std::function<void()> job) {
      const std::lock_guard lock(mutex);
      queue.push(std::move(job));
      wake.notify_all();
    }
    void stop() {
      const std::lock_guard lock(mutex);
      is_over = true;
      wake.notify_all();
    }
    void run() {
      for (;;) {
        std::unique_lock lock(mutex);
        wake.wait(lock, [this] { return is_over || !queue.empty(); });
        if (queue.empty()) return;
        const std::function<void()> job = std::move(queue.front());
        queue.pop();
        lock.unlock();
        job();
      }
    }
  };
  const std::shared_ptr<Jobs> jobs_ = std::make_shared<Jobs>();
  std::atomic<bool> is_stuck_ = false;
  std::thread thread_;
};

class SignedStore : public TextStore {
 public:
  SignedStore(const StoreAddress& address, std::string prefix, double timeout_s)
      : address_(address), prefix_(std::move(prefix)), timeout_s_(timeout_s) {
    const auto connect = [address, prefix = prefix_, timeout_s]() -> C10dStore {
      return connect_c10d_store(address, prefix, timeout_s);
    };
    // c10d's own time-out, and as long again for the first answer.
    std::optional<C10dStore> store = worker_.run(connect, 2 * timeout_s);
    CALDERA_CHECK(store, DistributedError,
                  "{} accepts connections but does not answer as a run's store does: does another program "
                  "listen there, or is "
                  "its launcher stopped?",
                  address_.text());
    store_ = std::move(*store);
  }

  void set(const std::string& key, const std::string& value) override {
    call([store = store_, key, value = sealed(key, value)] {
      store->set(key, bytes_of(value));
      return true;
    });
  }
  std::optional<std::string> find(const std::string& key) override {
    const auto value = call([store = store_, key]() -> std::optional<std::string> {
      if (!store->check({key})) return std::nullopt;
      return text_of(store->get(key));
    });
    return value ? opened(key, *value) : std::nullopt;
  }
  std::vector<std::string> get_all(const std::vector<std::string>& keys) override {
    const auto found = call([store = store_, keys] { return store->multiGet(keys); });
    std::vector<std::string> values;
    for (size_t i = 0; i < keys.size(); ++i)
      values.push_back(opened(keys[i], text_of(found[i])).value_or(""));
    return values;
  }
  std::string set_once(const std::string& key, const std::string& value) override {
    return compare_and_set(key, {}, value);
  }
  std::string replace(const std::string& key, const std::string& expected,
                      const std::string& value) override {
    return compare_and_set(key, sealed(key, expected), value);
  }
  void remove(const std::string& key) override {
    call([store = store_, key] { return store->deleteKey(key); });
  }
  int64_t num_rejected() const override { return num_rejected_; }
  void set_timeout(double timeout_s) override { timeout_s_ = timeout_s; }

 private:
  std::string sealed(const std::string& key, const std::string& value) const {
    if (address_.secret.empty()) return value;
    return signature_of(address_.secret, fmt::format("{}/{}={}", prefix_, key, value)) + value;
  }
  std::optional<std::string> opened(const std::string& key, const std::string& value) {
    if (address_.secret.empty()) return value;
    if (value.size() >= kSignatureDigits) {
      std::string text = value.substr(kSignatureDigits);
      if (value == sealed(key, text)) return text;
    }
    ++num_rejected_;
    return std::nullopt;
  }
  std::string compare_and_set(const std::string& key, const std::string& expected, const std::string& value) {
    const std::string desired = sealed(key, value);
    const std::string held = call([store = store_, key, expected, desired] {
      return text_of(store->compareSet(key, bytes_of(expected), bytes_of(desired)));
    });
    if (auto text = opened(key, held)) return *text;
    set(key, value);  // over a stranger's
    return value;
  }

  template <class Call>
  auto call(Call call) -> decltype(call()) {
    decltype(worker_.run(call, timeout_s_)) result;
    try {
      result = worker_.run(std::move(call), timeout_s_);
    } catch (const std::exception& error) {
      throw StoreGone(
          fmt::format("the run's store at {} is gone: {}", address_.text(), first_line(error.what())));
    }
    CALDERA_CHECK(result, StoreError,
                  "the run's store at {} has not answered for {:.0f} s: its launcher or rank 0 is stopped, "
                  "its machine gone, "
                  "or the network between",
                  address_.text(), timeout_s_.load());
    return *std::move(result);
  }

  const StoreAddress address_;
  const std::string prefix_;
  std::atomic<double> timeout_s_;
  std::atomic<int64_t> num_rejected_ = 0;
  C10dStore store_;
  Worker worker_;
};

c10d::TCPStoreOptions options_of(const StoreAddress& address, double timeout_s) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(address.port);
  options.waitWorkers = false;
  options.timeout = milliseconds(timeout_s);
  return options;
}

// A socket bound to the loop-back alone, for c10d to listen at; the port it got.
int bind_to_loopback(StoreAddress& address) {
  const int descriptor = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int on = 1;
  sockaddr_in place{};
  place.sin_family = AF_INET;
  place.sin_port = htons(static_cast<uint16_t>(address.port));
  place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof place;
  if (descriptor < 0 || ::setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
      ::bind(descriptor, reinterpret_cast<sockaddr*>(&place), size) != 0 ||
      ::getsockname(descriptor, reinterpret_cast<sockaddr*>(&place), &size) != 0) {
    const std::string reason = std::strerror(errno);
    ::close(descriptor);
    throw DistributedError(fmt::format("cannot listen on port {}: {}", address.port, reason));
  }
  address.port = ntohs(place.sin_port);
  return descriptor;
}

}  // namespace

std::string StoreAddress::text() const {
  return host.find(':') == std::string::npos ? fmt::format("{}:{}", host, port)
                                             : fmt::format("[{}]:{}", host, port);
}

void survive_broken_connections() { std::signal(SIGPIPE, SIG_IGN); }

std::string run_secret() {
  const char* secret = std::getenv("CALDERA_RUN_SECRET");
  return secret != nullptr ? secret : "";
}

std::string signature_of(const std::string& secret, const std::string& text) {
  constexpr size_t kBlock = 64;
  const auto hex_digest = [](const std::string& bytes) { return c10::sha1(bytes).str(); };
  const auto digest = [&](const std::string& bytes) {
    const std::string hex = hex_digest(bytes);
    std::string result;
    for (size_t i = 0; i < hex.size(); i += 2)
      result.push_back(static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
    return result;
  };
  std::string key = secret.size() > kBlock ? digest(secret) : secret;
  key.resize(kBlock, '\0');
  std::string inner = key, outer = key;
  for (char& c : inner) c = static_cast<char>(c ^ 0x36);
  for (char& c : outer) c = static_cast<char>(c ^ 0x5C);
  return hex_digest(outer + digest(inner + text));
}

c10::intrusive_ptr<c10d::Store> connect_c10d_store(const StoreAddress& address, const std::string& prefix,
                                                   double timeout_s) {
  try {
    return c10::make_intrusive<c10d::PrefixStore>(
        prefix, c10::make_intrusive<c10d::TCPStore>(address.host, options_of(address, timeout_s)));
  } catch (const std::exception& error) {
    throw StoreGone(
        fmt::format("cannot reach the run's store at {}: {}", address.text(), first_line(error.what())));
  }
}

std::unique_ptr<TextStore> connect_store(const StoreAddress& address, const std::string& prefix,
                                         double timeout_s) {
  return std::make_unique<SignedStore>(address, prefix, timeout_s);
}

c10::intrusive_ptr<c10d::Store> host_store(StoreAddress& address, bool is_local, double timeout_s) {
  std::optional<int> descriptor;
  if (is_local) descriptor = bind_to_loopback(address);
  c10d::TCPStoreOptions options = options_of(address, timeout_s);
  options.isServer = true;
  options.masterListenFd = descriptor;
  try {
    auto store = c10::make_intrusive<c10d::TCPStore>("127.0.0.1", options);
    address.port = store->getPort();
    return store;
  } catch (const std::exception& error) {
    throw DistributedError(
        fmt::format("cannot listen on port {}: {}", address.port, first_line(error.what())));
  }
}

}  // namespace caldera
