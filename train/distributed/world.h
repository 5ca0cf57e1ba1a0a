// The processes that train together: collectives on tensors, exchange of texts, and the watch over every
// rank.
//
// Tensors go through one process group of LibTorch's c10d (Gloo on CPUs, NCCL on GPUs), which only the
// training thread uses and in the same order on every rank. Texts (paths, manifests, errors) go through the
// TCP store, which any thread may use. A thread of its own writes a heartbeat per rank into the store, with
// the step and the phase it is in. What the training thread reads, writes and hashes of files counts as
// headway.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/headway.h"
#include "train/distributed/environment.h"

namespace caldera {

// Another rank failed, or no longer answers; this one is well.
struct PeerError : DistributedError {
  using DistributedError::DistributedError;
};

// Keeps c10d's own log lines from the terminal: what they say comes as an exception, too.
// TORCH_CPP_LOG_LEVEL, where the user sets it, counts more.
void quiet_c10d();

// Waits for a collective that was begun. On a GPU the current stream waits, not the caller: see wait_for_device.
using Wait = std::function<void()>;

// Whom a collective is among: all ranks, those of this rank's machine, or those that have this rank's place
// on each machine.
enum class Among { kAll, kMachine, kPeers };

class World {
 public:
  // A single process without a group: every operation is empty.
  static World& alone();
  // Joins the others, who may come up to `timeout_s` later; returns when all are there. `timeout_s`: how long
  // a rank may be silent, or make no headway while others wait for it, before all stop with its name; and how
  // long the run's store may take to answer. `on_abort` is called on the watching thread when this process
  // must end although its training thread does not come back; it must not return. Throws DistributedError;
  // where another rank failed meanwhile, or is missing, PeerError.
  World(const WorldSpec& spec, at::Device device, double timeout_s,
        std::function<void(const std::string&)> on_abort);
  ~World();
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int rank() const { return spec_.rank; }
  int size() const { return spec_.size; }
  bool has_group() const { return group_ != nullptr; }
  bool is_first() const { return spec_.rank == 0; }
  const WorldSpec& spec() const { return spec_; }
  // Each rank's machine, by rank.
  const std::vector<std::string>& hosts() const { return hosts_; }
  // A rank in messages: "rank 3 (node1)"; "rank 3" where all ranks are on one machine.
  std::string who(int rank) const;
  // "4 ranks on 2 machines, gloo, started by torchrun".
  std::string describe() const;

  // Before collectives among a machine's ranks, or among peers; all ranks call it. Where there is one machine, or one rank
  // on each, there are no such groups. Throws ConfigError where the machines do not have the same number of ranks, numbered
  // machine by machine.
  void split_by_machine();

  // Collectives on dense tensors of the group's device. `sum` leaves the same bits on every rank.
  Wait sum(at::Tensor tensor, Among among = Among::kAll);
  // out [n] of in [ranks * n]: this rank's part of the sum.
  Wait reduce_scatter(at::Tensor out, at::Tensor in, Among among = Among::kAll);
  // out [ranks * n] from each rank's in [n]; `in` may be the rank's own part of `out`.
  Wait all_gather(at::Tensor out, at::Tensor in, Among among = Among::kAll);
  // Until a GPU has come through all that was begun, collectives included: before the host reads back what depends on
  // them, so that the watch knows whom this rank waits for. Nothing on a CPU.
  void wait_for_device();
  int64_t num_collectives() const { return num_collectives_; }
  // Of the whole tensors that collectives were about: the summed one, the scattered one, the gathered one.
  int64_t num_bytes() const { return num_bytes_; }
  double take_waited_ms();  // spent in Wait since the last call

  // Every rank's text, in the order of ranks. Ranks call it in the same order per channel; a channel may be
  // used by one thread at a time: "save" by the one that writes a checkpoint, others by the training thread.
  // Throws PeerError when a rank has failed meanwhile.
  std::vector<std::string> exchange(const std::string& channel, const std::string& mine);
  // After work that the first rank does for all.
  std::string from_first(const std::string& text) { return exchange("main", text).front(); }
  void barrier() { exchange("main", ""); }

  // Says where this rank is, for the watch and for messages.
  void at(int64_t step, const char* phase);
  // Tells the others that this rank fails with `error`, from any thread. The first failure of any rank
  // counts.
  void tell(std::exception_ptr error);
  // This rank fails with `error`: tells the others, then throws the first error that this rank told, or where
  // another rank was first, or a connection broke, PeerError with the cause: who failed, with what message
  // and where.
  [[noreturn]] void fail(std::exception_ptr error);

 private:
  friend class SavingLane;
  World();
  struct Group;
  void connect(const std::string& prefix, std::function<void(const std::string&)> on_abort);
  std::vector<std::string> join(const std::string& mine);
  template <class Start>
  Wait begin(std::vector<at::Tensor> tensors, const Start& start);

  WorldSpec spec_;
  double timeout_s_ = 0;
  std::vector<std::string> hosts_;
  std::unique_ptr<Group> group_;  // none: alone
  int64_t num_collectives_ = 0, num_bytes_ = 0;
  double waited_ms_ = 0;
};

// While it lives, this thread writes the checkpoint of step `step` together with the other ranks: the watch
// looks at that beside the training, or instead of it where this is the training thread. What the thread
// reads, writes and hashes of files counts as headway.
class SavingLane {
 public:
  SavingLane(World& world, int64_t step);
  ~SavingLane();
  SavingLane(const SavingLane&) = delete;
  SavingLane& operator=(const SavingLane&) = delete;

 private:
  World& world_;
  bool on_training_thread_ = false;
  std::optional<HeadwayScope> headway_;
};

}  // namespace caldera
