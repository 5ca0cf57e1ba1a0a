// Parameters of the model: plain tensors with HF names. There is no module tree: a component lists its
// tensors once, and loading, saving, initialisation, freezing, the optimizer and checkpoints all work from
// that list.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/aten.h"

namespace caldera {

// One tensor of a component under its HF name. Where several HF tensors are fused into one (q, k, v in one
// matrix, gate and up in one), each is a range of rows of the fused tensor, `owner`; otherwise it is the
// whole owner. HF names are relative to the component: "encoder.layers.0.self_attn.q_proj.weight".
struct NamedTensor {
  std::string name;
  at::Tensor* owner = nullptr;  // the leaf that autograd and the optimizer see; lives in the component
  int64_t row_begin = 0;
  int64_t num_rows = -1;  // -1: all of the owner

  // A view that shares the owner's storage, detached from autograd.
  at::Tensor value() const { return slice(owner->detach()); }
  // The same rows of the owner's gradient; undefined where there is none.
  at::Tensor grad() const { return owner->grad().defined() ? slice(owner->grad()) : at::Tensor(); }

 private:
  at::Tensor slice(const at::Tensor& whole) const {
    return num_rows < 0 ? whole : whole.narrow(0, row_begin, num_rows);
  }
};

using NamedTensors = std::vector<NamedTensor>;

// The same list with "PREFIX." before each name.
NamedTensors with_prefix(const std::string& prefix, NamedTensors tensors);
void append(NamedTensors& list, NamedTensors more);

// Sets requires_grad of every owner (float tensors only).
void set_trainable(const NamedTensors& tensors, bool trainable);
// Elements of the distinct owners.
int64_t count_parameters(const NamedTensors& tensors);
// Moves every owner to the device and dtype, in place (buffers listed here too).
void convert(const NamedTensors& tensors, at::Device device, at::ScalarType dtype);

// Fresh weights, HF's initialisation: normal(0, std) for matrices and embeddings, zero for biases, one for
// norm weights. Draws from a generator of its own, seeded by (seed, name), so it does not depend on what else
// is made before.
void init_normal_(at::Tensor& tensor, double std, uint64_t seed, const std::string& name);
// The same, uniform in [-bound, bound).
void init_uniform_(at::Tensor& tensor, double bound, uint64_t seed, const std::string& name);

}  // namespace caldera
