// One AdamW update in one pass over memory.
#pragma once

#include <cstdint>

#include "base/aten.h"

namespace caldera {

struct AdamWStep {
  double learning_rate = 0, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;
  double grad_scale = 1;  // the gradient is multiplied by it
  int64_t count = 1;      // updates done, this one included
};

// Weights as AdamW updates them: float32 ones; or bfloat16 ones, of which `remainder` makes float32 masters.
// The bits of a master are (the weight's bits << 16) + remainder, so the weight is the nearest bfloat16 (of
// two as near, the one further from zero), and a master costs 2 bytes beside it. Bfloat16 weights without a
// remainder are all there is. Copies share the memory.
struct Master {
  at::Tensor weight;     // float32 or bfloat16, contiguous
  at::Tensor remainder;  // int16, as many elements; or undefined

  // With the weights' present values: the remainder of bfloat16 ones is zeros.
  static Master of(const at::Tensor& weight);
  // Float32, in a tensor of its own in host memory; without a remainder the weight itself.
  at::Tensor values() const;
  at::ScalarType values_type() const { return remainder.defined() ? at::kFloat : weight.scalar_type(); }
  Master rows(int64_t begin, int64_t count) const;  // shares the memory
  // Sets them to float32 values.
  void assign(const at::Tensor& values) const;
};

// Updates a master that is float32 or has a remainder, and float32 `exp_avg` and `exp_avg_sq`, by a float32 or
// bfloat16 gradient (undefined: zeros; it is not changed). All are dense and of as many elements. The numbers of
// torch.optim.AdamW(fused=True) (Loshchilov & Hutter, arXiv 1711.05101).
void adamw_update(const Master& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                  const at::Tensor& gradient, const AdamWStep& step);

}  // namespace caldera
