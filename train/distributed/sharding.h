// How the ranks share a step's gradients, the optimizer's state and the weights. One mechanism: the tensors
// of a block lie in one flat buffer, of which each of the ranks that share it owns an equal part.
//
// clang-format off
//          gradients                            optimizer's state, masters  weights
//   ddp    the whole sum on every rank          whole on every rank         whole on every rank
//   zero1  each rank gets its part of the sum   its part                    whole, gathered after the update,
//                                                                           while the next forward pass runs
//   zero2  the same, after each micro-batch     its part                    the same
//   zero3  as zero2                             its part                    of the decoder's blocks, frozen ones
//                                                                           too, its part, gathered while the
//                                                                           block runs; of the rest: whole
// clang-format on
//
// Ranks are S that share x R that hold the same part. ddp is S = 1, the others R = 1; `shard_within: node`
// makes S the ranks of a machine and R the machines. A unit's gradients are reduce-scattered among the S, and
// what a rank owns of them is summed among the R, once a step.
//
// Gradients are summed over a rank's micro-batches in float32 and reduced once a step (zero2 and zero3 keep
// no whole gradients, so they reduce-scatter after each micro-batch). A block's reduction begins as soon as
// its last gradient is there, while the backward pass goes on; the weights of the block that comes next are
// gathered while the present one computes. The order of all that is the same on every rank, whatever its
// samples touch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/aten.h"
#include "model/weights/safetensors.h"
#include "train/distributed/layout.h"
#include "train/distributed/world.h"
#include "train/optimizer.h"
#include "train/recipe.h"

namespace caldera {

class Sharding {
 public:
  // Lays the tensors out; but for ddp the model's weights become views of the flat buffers. For ranks that
  // have a group. `decoder`: all tensors of the language model, of which some may train.
  Sharding(World& world, const DistributedConfig& config, const std::vector<ParameterGroup>& groups,
           const NamedTensors& decoder);
  ~Sharding();

  // Where this rank's part of each tensor lies: what AdamW is made with. Empty for ddp.
  const OwnedParts& owned() const { return owned_; }
  // "zero2", "zero2 within each machine".
  std::string describe() const;
  // Whether one rank's optimizer holds the state of the whole.
  bool is_replicated() const { return strategy_ == Strategy::kDdp; }
  // Which part of the optimizer's state this rank is to save, of num_parts(); -1: another rank holds the
  // same.
  int part() const { return replica_ == 0 ? shard_ : -1; }
  int num_parts() const { return num_shards_; }

  // Around each micro-batch's forward and backward. All ranks go through all rounds of a step, with a
  // micro-batch or without.
  void begin_round(bool is_last);
  void end_round();
  void begin_evaluation();  // a forward pass outside of a step
  // Instead of a forward or a backward pass, where other ranks run one: takes part in the gathering of
  // blocks.
  void idle_forward();
  void idle_backward();
  // After the last round: hands this rank's gradients to the optimizer. Returns the sum of squares of its
  // equal share of the whole gradient; summed over the ranks that is the gradient's squared norm.
  double hand_gradients_to(AdamW& optimizer);
  // After an update, or after the optimizer's masters were written: the weights are on their way to be whole again.
  // What lies outside of blocks is there from the next begin_round() or begin_evaluation() on, a block once it is held.
  void begin_gather_weights();
  // Whether blocks are there only while held.
  bool frees_blocks() const { return strategy_ == Strategy::kZero3; }
  // Before a block runs: its weights are there while the result lives. With zero3 brings them, and begins to bring those
  // of the block that runs next; all ranks hold the same blocks in the same order. With zero1 and zero2 waits for them
  // where they are on their way. Nothing for ddp.
  std::shared_ptr<void> hold(size_t layer);
  // All weights at once, to stay.
  void hold_all();
  // The float32 masters, whole, under their HF names in the first rank's host memory; empty on the others.
  // All ranks call it.
  StateList gather_masters(const AdamW& optimizer);

 private:
  enum class Strategy { kDdp, kZero1, kZero2, kZero3 };
  struct Unit;
  struct Hook;
  void on_gradient(Unit& unit, const FlatUnit::Leaf& leaf);
  void lay_out(Unit& unit);
  void begin_gather(size_t layer);
  void finish_gathers(int64_t layer);
  void start_next();
  void start_ready(bool all);
  void start_layers_behind(int64_t layer);
  void take_part(Unit& unit);
  void start_replicas(Unit& unit);

  World& world_;
  Strategy strategy_;
  Among sharers_ = Among::kAll, replicas_ = Among::kAll;
  int num_shards_ = 1, shard_ = 0;      // S, and which part is this rank's
  int num_replicas_ = 1, replica_ = 0;  // R, and which of those with the same part this rank is
  at::ScalarType reduce_dtype_;
  std::vector<std::unique_ptr<Unit>> units_;   // of what trains, in the order in which they are reduced
  std::vector<std::unique_ptr<Unit>> frozen_;  // of blocks that are freed
  std::vector<std::vector<Unit*>> blocks_;     // by layer: what is gathered and freed
  OwnedParts owned_;
  size_t next_ = 0;           // unit to be reduced
  bool is_reducing_ = false;  // in this round
  bool is_last_ = false;      // round of the step
  bool begins_step_ = true;
  size_t num_forward_ = 0;  // blocks held in this round's forward pass
};

}  // namespace caldera
