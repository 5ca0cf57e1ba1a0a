// AdamW over the tensors that train.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/aten.h"
#include "model/module.h"
#include "model/ops/adamw_compact.h"

namespace caldera {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double weight_decay = 0;       // of tensors with two or more dimensions (HF: no decay of biases and norms)
  bool has_8bit_states = false;  // of the tensors that with_8bit_states() names
  bool has_masters = true;       // false: bfloat16 weights are rounded stochastically, by noise from `seed`
  bool is_offloaded = false;     // masters and moments are in host memory, and the update runs there
  uint64_t seed = 0;
};

// Tensors that share a peak learning rate.
struct ParameterGroup {
  std::string name;  // "projector", "language_model", "vision_tower"
  double learning_rate = 0;
  NamedTensors tensors;
};

// The part of a tensor whose state this process holds, where several share it: elements [begin, begin +
// weight.numel()) of the flattened tensor. `weight` [n] is their place in the model's memory, in the model's
// dtype.
struct OwnedPart {
  int64_t begin = 0;
  at::Tensor weight;
};
using OwnedParts = std::unordered_map<const at::Tensor*, OwnedPart>;  // by NamedTensor::owner

// The optimizer's state where it lies, under its names in checkpoints. What is not kept in halves is a Master
// without remainder: float32 weights, those without masters, and moments.
using StateList = std::vector<std::pair<std::string, Master>>;

// Of which tensors 8 bits hold the states: of two or more dimensions and at least 4096 elements, tables of
// tokens and positions excepted, as HF's Trainer has it with bitsandbytes; the parts of a fused one must
// begin at a block of 256. Vectors of any length stay float32, which bitsandbytes decides by the number of
// elements alone.
std::unordered_set<const at::Tensor*> with_8bit_states(const std::vector<ParameterGroup>& groups);

// Decoupled weight decay Adam (Loshchilov & Hutter, arXiv 1711.05101), the numbers of
// torch.optim.AdamW(fused=True). With 8-bit states the codes are those of bitsandbytes' block-wise AdamW8bit,
// the update is our own (docs/memory.md). A bfloat16 tensor is the upper half of float32 masters, whose lower
// half is kept beside it; without masters its own value is all there is, and the noise of its rounding is a
// function of the seed, the update, its name and the element, so that ranks agree and a resumed run repeats
// it. Gradients of several micro-batches are summed in float32.
class AdamW {
 public:
  // `owned`: empty where this process holds the state of all tensors in whole, else a part of each.
  AdamW(std::vector<ParameterGroup> groups, const AdamWOptions& options, const OwnedParts& owned = {});

  // Takes the gradients of one micro-batch from the tensors (call after each backward). With `more_to_come`
  // false and nothing summed before, they are used where they are.
  void take_gradients(bool more_to_come);
  // Euclidean norm of all gradients taken, in float32: a scalar tensor on the device.
  at::Tensor grad_norm() const;
  // The gradient of a tensor, or of the part of it that is owned, from elsewhere: float32, used where it is
  // until step().
  void set_gradient(const at::Tensor* owner, const at::Tensor& gradient);
  // One update with learning rates group.learning_rate * lr_factor and gradients times grad_scale; then
  // forgets them.
  void step(double lr_factor, double grad_scale);

  int64_t num_updates() const { return num_updates_; }
  const std::vector<ParameterGroup>& groups() const { return groups_; }
  // Masters (without them: the weights) under their HF names. Of a tensor that is owned in part,
  // "NAME@BEGIN" [n] are elements [BEGIN, BEGIN + n) of the flattened NAME; where nothing of it is owned, it
  // does not appear.
  StateList masters() const;
  // The moments, likewise, as "exp_avg.NAME" and "exp_avg_sq.NAME", where those are codes of 8 bits beside
  // "exp_avg_scale.NAME" and "exp_avg_sq_scale.NAME".
  StateList moments() const;
  at::Tensor master(const at::Tensor* owner) const { return slots_[slot_of_.at(owner)].master.values(); }
  // Goes on from another state, which was written to masters() and moments().
  void restore(int64_t num_updates);

 private:
  // One fused or plain leaf tensor; its HF names are ranges of its rows.
  struct Slot {
    at::Tensor weight, grad_sum;
    at::Tensor place;  // the weight, or the owned part of it
    Master master;     // of the place; offloaded, of its copy in host memory
    Moment exp_avg, exp_avg_sq;
    uint64_t noise = 0;  // of its name
    int64_t begin = 0;
    size_t group = 0;
    bool decays = false;
    bool is_part = false;
    bool is_away() const { return master.weight.device() != place.device(); }
  };
  // `value` of each slot under its HF names; each element of it stands for so many of the weight.
  StateList views(const std::string& prefix, const std::function<Master(const Slot&)>& value,
                  int64_t elements_each = 1) const;
  void update(const Slot& slot, const AdamWStep& step) const;

  std::vector<ParameterGroup> groups_;
  AdamWOptions options_;
  std::vector<Slot> slots_;
  std::unordered_map<const at::Tensor*, size_t> slot_of_;
  int64_t num_updates_ = 0;
};

}  // namespace caldera
