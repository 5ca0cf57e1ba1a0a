// The process groups of c10d that ranks send tensors through, and the addresses by which machines reach one
// another.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <string>
#include <vector>

namespace caldera {

// The message of an exception of c10d's or Gloo's, without the stack's frames.
std::string without_trace(const std::exception& error);

// The way from this machine to another, as numeric addresses: what this one sends from, and what the other is
// reached by.
struct Route {
  std::string own, peer;
};
// To where `host` listens. Nothing is sent. Throws DistributedError where the name resolves to nothing that
// can be reached.
Route route_to(const std::string& host, int port);

// The address that rank `rank` tells the others: its own on the way to the store. On the store's machine that
// is a loop-back address if the machine's name leads to one, as on Debian: then it is what ranks of other
// machines reach the store by. `routes`: each rank's, to the store.
std::string address_among(const std::vector<Route>& routes, int rank);

struct BackendSpec {
  int rank = 0, size = 1;
  at::Device device = at::kCPU;
  std::string machine, address;  // this machine's name, for messages, and the address that others reach it by
  std::chrono::milliseconds timeout{};
};
// NCCL's for ranks on GPUs, which finds its addresses itself; else Gloo's, where GLOO_SOCKET_IFNAME counts
// more than the address. Returns when all ranks are connected. Throws DistributedError, or what NCCL's
// throws.
c10::intrusive_ptr<c10d::Backend> make_backend(const BackendSpec& spec,
                                               const c10::intrusive_ptr<c10d::Store>& store);

}  // namespace caldera
