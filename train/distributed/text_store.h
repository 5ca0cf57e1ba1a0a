// The store of a run, through which its processes exchange texts: c10d's TCP store, with a deadline on every
// call and a signature on every value.
//
// c10d waits for an answer without end, a quarter of an hour for a machine whose cable was pulled. And
// whoever reaches the store's port may write into it: only values signed with the run's secret count, all
// others are as if absent.
#pragma once
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"

namespace caldera {

// The store cannot be talked to.
struct StoreError : DistributedError {
  using DistributedError::DistributedError;
};
// Nothing listens at its address, any more or not yet.
struct StoreGone : StoreError {
  using StoreError::StoreError;
};

// Any thread may call. All calls throw StoreError: StoreGone at once, or where no answer comes in time, and
// then in all calls that follow.
class TextStore {
 public:
  virtual ~TextStore() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  virtual std::optional<std::string> find(const std::string& key) = 0;
  // Keys that are there; "" for one that is not signed.
  virtual std::vector<std::string> get_all(const std::vector<std::string>& keys) = 0;
  // Sets the key where it is absent; what it holds afterwards.
  virtual std::string set_once(const std::string& key, const std::string& value) = 0;
  // Sets the key where it holds `expected`; what it holds afterwards.
  virtual std::string replace(const std::string& key, const std::string& expected,
                              const std::string& value) = 0;
  virtual void remove(const std::string& key) = 0;
  // Values seen whose signature is not this run's: of a process with another secret, or of a stranger.
  virtual int64_t num_rejected() const { return 0; }
  virtual void set_timeout(double /*timeout_s*/) {}  // of the calls that follow
};

struct StoreAddress {
  std::string host = "127.0.0.1";
  int port = 0;
  std::string secret;  // "": values are not signed

  std::string text() const;  // "node0:29500", "[fd77::10]:29500"
};

// A connection whose other end has died gives an error when it is written to, as it does in Python; the
// signal that else comes with it would end this process too, before it has said who died. c10d and Gloo write
// without care.
void survive_broken_connections();

// CALDERA_RUN_SECRET of the environment; "" where it is not set.
std::string run_secret();

// A connection to the store, whose keys are PREFIX/KEY, trying again until `timeout_s` is over. Throws
// StoreGone where nothing listens there, DistributedError where what listens is no store.
std::unique_ptr<TextStore> connect_store(const StoreAddress& address, const std::string& prefix,
                                         double timeout_s);
// The same for a process group. Its calls are c10d's own, without deadlines.
c10::intrusive_ptr<c10d::Store> connect_c10d_store(const StoreAddress& address, const std::string& prefix,
                                                   double timeout_s);
// A store that this process hosts, on the address's port, or where it is 0 on any that is free, which is then
// set. Only processes of this machine reach it if `is_local`. Throws DistributedError where the port is
// taken.
c10::intrusive_ptr<c10d::Store> host_store(StoreAddress& address, bool is_local, double timeout_s);

// HMAC-SHA1 (RFC 2104) as 40 hex digits.
std::string signature_of(const std::string& secret, const std::string& text);

}  // namespace caldera
