#include "train/distributed/backend.h"

#define USE_C10D_GLOO 1
#include <dlfcn.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <array>
#include <cstdlib>
#include <memory>

#include "base/error.h"
#include "base/files.h"
#include "train/distributed/nccl_module.h"

namespace caldera {
namespace {

std::string numeric(const sockaddr_storage& address, socklen_t size) {
  std::array<char, NI_MAXHOST> text{};
  const int error = ::getnameinfo(reinterpret_cast<const sockaddr*>(&address), size, text.data(), text.size(),
                                  nullptr, 0, NI_NUMERICHOST);
  return error == 0 ? text.data() : "";
}

bool is_loopback(const std::string& address) {
  return address.starts_with("127.") || address == "::1" || address.starts_with("::ffff:127.");
}

c10::intrusive_ptr<c10d::Backend> make_nccl(const BackendSpec& spec,
                                            const c10::intrusive_ptr<c10d::Store>& store) {
  const std::string file = (fs::read_symlink("/proc/self/exe").parent_path() / "libcaldera_nccl.so").string();
  void* const library = ::dlopen(file.c_str(), RTLD_NOW | RTLD_GLOBAL);
  CALDERA_CHECK(
      library != nullptr, DistributedError,
      "several ranks on GPUs need NCCL, and its part of this program does not open: {}; it is built where "
      "NCCL's headers are, and belongs beside the program",
      ::dlerror());
  c10::intrusive_ptr<c10d::Backend> group;
  reinterpret_cast<decltype(&caldera_make_nccl_group)>(::dlsym(library, "caldera_make_nccl_group"))(
      store, spec.rank, spec.size, spec.device, spec.timeout, group);
  return group;
}

}  // namespace

std::string without_trace(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find("\nException raised from "));
}

Route route_to(const std::string& host, int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_DGRAM;
  const int error = ::getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
  CALDERA_CHECK(error == 0, DistributedError, "{}: no address: {}", host, ::gai_strerror(error));
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> list(found, ::freeaddrinfo);
  for (const addrinfo* place = found; place != nullptr; place = place->ai_next) {
    // A datagram socket that is connected has an address of its own, though nothing was sent.
    const int descriptor = ::socket(place->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_storage own{}, peer{};
    socklen_t own_size = sizeof own, peer_size = sizeof peer;
    const bool is_there = descriptor >= 0 && ::connect(descriptor, place->ai_addr, place->ai_addrlen) == 0 &&
                          ::getsockname(descriptor, reinterpret_cast<sockaddr*>(&own), &own_size) == 0 &&
                          ::getpeername(descriptor, reinterpret_cast<sockaddr*>(&peer), &peer_size) == 0;
    if (descriptor >= 0) ::close(descriptor);
    if (is_there) return {numeric(own, own_size), numeric(peer, peer_size)};
  }
  throw DistributedError(fmt::format("{}: no way from this machine to any of its addresses", host));
}

std::string address_among(const std::vector<Route>& routes, int rank) {
  const std::string& own = routes[static_cast<size_t>(rank)].own;
  if (!is_loopback(own)) return own;
  for (const Route& route : routes)
    if (!is_loopback(route.own) && !is_loopback(route.peer)) return route.peer;
  return own;  // "machines" that are one
}

c10::intrusive_ptr<c10d::Backend> make_backend(const BackendSpec& spec,
                                               const c10::intrusive_ptr<c10d::Store>& store) {
  if (spec.device.is_cuda()) return make_nccl(spec, store);
  const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
  try {
    auto options = c10d::ProcessGroupGloo::Options::create(spec.timeout);
    options->devices.push_back(interface != nullptr
                                   ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                                   : c10d::ProcessGroupGloo::createDeviceForHostname(spec.address));
    return c10::make_intrusive<c10d::ProcessGroupGloo>(store, spec.rank, spec.size, options);
  } catch (const std::exception& error) {
    throw DistributedError(fmt::format(
        "Gloo does not connect {} ({}) with the other ranks: {}; set GLOO_SOCKET_IFNAME to the interface "
        "that reaches the "
        "other machines",
        spec.machine,
        interface != nullptr ? fmt::format("GLOO_SOCKET_IFNAME={}", interface) : "address " + spec.address,
        without_trace(error)));
  }
}

}  // namespace caldera
