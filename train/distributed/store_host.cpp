#include "train/distributed/store_host.h"

#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <csignal>

#include "base/error.h"
#include "base/json.h"
#include "train/distributed/watch.h"

namespace caldera {

struct StoreHost::Store {
  c10::intrusive_ptr<c10d::TCPStore> tcp;
  std::optional<std::string> find(int attempt, const std::string& what) const {
    const std::string key = fmt::format("caldera/{}/{}", attempt, what);  // as World writes them
    if (!tcp->check({key})) return std::nullopt;
    const std::vector<uint8_t> bytes = tcp->get(key);
    return std::string(bytes.begin(), bytes.end());
  }
};

void survive_broken_connections() { std::signal(SIGPIPE, SIG_IGN); }

StoreHost::StoreHost(int port) : store_(std::make_unique<Store>()) {
  survive_broken_connections();
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(port);
  options.isServer = true;
  options.waitWorkers = false;
  try {
    store_->tcp = c10::make_intrusive<c10d::TCPStore>("127.0.0.1", options);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    throw DistributedError(
        fmt::format("cannot listen on port {}: {}", port, text.substr(0, text.find('\n'))));
  }
}

StoreHost::~StoreHost() = default;
int StoreHost::port() const { return store_->tcp->getPort(); }

std::optional<std::string> StoreHost::cause(int attempt) const {
  if (auto failure = store_->find(attempt, "failure")) return failure;
  return store_->find(attempt, "verdict");
}

std::string StoreHost::where(int attempt, int rank) const {
  const Json beat = Json::parse(store_->find(attempt, fmt::format("beat/{}", rank)).value_or(""), nullptr,
                                /*allow_exceptions=*/false);
  return beat.is_object() ? place_of(beat) : "";
}

}  // namespace caldera
