// AdamW with float32 master weights over the tensors that train.
#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model/module.h"

namespace caldera {

struct AdamWOptions {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
  double weight_decay = 0;  // of tensors with two or more dimensions (HF: no decay of biases and norms)
};

// Tensors that share a peak learning rate.
struct ParameterGroup {
  std::string name;  // "projector", "language_model", "vision_tower"
  double learning_rate = 0;
  NamedTensors tensors;
};

// Decoupled weight decay Adam (Loshchilov & Hutter, arXiv 1711.05101), the numbers of torch.optim.AdamW(fused=True).
// A tensor that is not float32 has a float32 master, from which it is rounded after each update. Gradients of several
// micro-batches are summed in float32.
class AdamW {
 public:
  AdamW(std::vector<ParameterGroup> groups, const AdamWOptions& options);

  // Takes the gradients of one micro-batch from the tensors (call after each backward). With `more_to_come` false and
  // nothing summed before, they are used where they are.
  void take_gradients(bool more_to_come);
  // Euclidean norm of all gradients taken, in float32: a scalar tensor on the device.
  at::Tensor grad_norm() const;
  // One update with learning rates group.learning_rate * lr_factor and gradients times grad_scale; then forgets them.
  void step(double lr_factor, double grad_scale);

  int64_t num_updates() const { return num_updates_; }
  const std::vector<ParameterGroup>& groups() const { return groups_; }
  // Float32 masters under their HF names; also "exp_avg.NAME" and "exp_avg_sq.NAME". Views: writing them writes the state;
  // call restore() afterwards.
  std::vector<std::pair<std::string, at::Tensor>> masters() const;
  std::vector<std::pair<std::string, at::Tensor>> moments() const;
  void restore(int64_t num_updates);  // after the views were written: sets the count and rounds the weights from the masters

 private:
  // One fused or plain leaf tensor; its HF names are ranges of its rows.
  struct Slot {
    at::Tensor weight, master, grad_sum, exp_avg, exp_avg_sq;
    size_t group = 0;
    bool decays = false;
    at::Tensor gradient() const;  // float32
  };
  std::vector<std::pair<std::string, at::Tensor>> views(const std::string& prefix, at::Tensor Slot::* member) const;

  std::vector<ParameterGroup> groups_;
  AdamWOptions options_;
  std::vector<Slot> slots_;
  std::vector<size_t> slot_index_;  // of each group's each tensor, in order
  int64_t num_updates_ = 0;
};

}  // namespace caldera
