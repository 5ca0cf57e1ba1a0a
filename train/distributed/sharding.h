// How the ranks share a step's gradients, the optimizer's state and the weights. One mechanism: the tensors
// of a block lie in one flat buffer, of which every rank owns an equal part.
//
//          gradients                             optimizer state, float32 masters   weights
//   ddp    summed on every rank                  on every rank                      on every rank
//   zero1  each rank gets its part of the sum    its part                           on every rank, gathered
//   after the update zero2  the same, after each micro-batch      its part                           the same
//   zero3  as zero2                              its part                           of the decoder's blocks,
//   frozen ones too: its part,
//                                                                                   gathered while the block
//                                                                                   runs; of the rest: whole
//
// Gradients are summed over a rank's micro-batches in float32 and reduced once a step (zero2 and zero3 keep
// no whole gradients, so they reduce after each micro-batch). A block's reduction begins as soon as its last
// gradient is there, while the backward pass goes on. The order is the same on every rank, whatever its
// samples touch.
#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "model/weights/safetensors.h"
#include "train/distributed/world.h"
#include "train/optimizer.h"
#include "train/recipe.h"

namespace caldera {

class Sharding {
 public:
  // Lays the tensors out; but for ddp the model's weights become views of the flat buffers. For two or more
  // ranks. `decoder`: all tensors of the language model, of which some may train.
  Sharding(World& world, const DistributedConfig& config, const std::vector<ParameterGroup>& groups,
           const NamedTensors& decoder);
  ~Sharding();

  // Where this rank's part of each tensor lies: what AdamW is made with. Empty for ddp.
  const OwnedParts& owned() const { return owned_; }
  // Whether one rank's optimizer holds the state of the whole.
  bool is_replicated() const { return strategy_ == Strategy::kDdp; }

  // Around each micro-batch's forward and backward. All ranks go through all rounds of a step, with a
  // micro-batch or without.
  void begin_round(bool is_last);
  void end_round();
  void begin_evaluation() { num_forward_ = 0; }  // a forward pass outside of a step
  // Instead of a forward or a backward pass, where other ranks run one: takes part in the gathering of
  // blocks.
  void idle_forward();
  void idle_backward();
  // After the last round: hands this rank's gradients to the optimizer. Returns the sum of squares of its
  // equal share of the whole gradient; summed over the ranks that is the gradient's squared norm.
  double hand_gradients_to(AdamW& optimizer);
  // After an update, or after the optimizer's masters were written: the weights are whole again.
  void gather_weights();
  // Whether blocks are there only while held.
  bool frees_blocks() const { return strategy_ == Strategy::kZero3; }
  // Brings a block's weights, which stay while the result lives. All ranks hold the same blocks in the same
  // order.
  std::shared_ptr<void> hold(size_t layer);
  // All blocks at once, to stay.
  void hold_all();
  // The float32 masters, whole, under their HF names in the first rank's host memory; empty on the others.
  // All ranks call it.
  TensorList gather_masters(const AdamW& optimizer);

 private:
  enum class Strategy { kDdp, kZero1, kZero2, kZero3 };
  struct Leaf;
  struct Unit;
  struct Hook;
  void on_gradient(Unit& unit, Leaf& leaf);
  void lay_out(Unit& unit);
  void start(Unit& unit);
  void start_ready(bool all);
  void start_layers_behind(int64_t layer);

  World& world_;
  Strategy strategy_;
  at::ScalarType reduce_dtype_;
  std::vector<std::unique_ptr<Unit>> units_;   // of what trains, in the order in which they are reduced
  std::vector<std::unique_ptr<Unit>> frozen_;  // of blocks that are freed
  std::vector<std::vector<Unit*>> blocks_;     // by layer: what is gathered and freed
  OwnedParts owned_;
  size_t next_ = 0;           // unit to be reduced
  bool is_reducing_ = false;  // in this round
  bool begins_step_ = true;
  size_t num_forward_ = 0;  // blocks held in this round's forward pass
};

}  // namespace caldera
