// One AdamW update in one pass over memory.
#pragma once
#include <ATen/ATen.h>

#include <cstdint>

namespace caldera {

struct AdamWStep {
  double learning_rate = 0, beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;
  double grad_scale = 1;  // the gradient is multiplied by it
  int64_t count = 1;      // updates done, this one included
};

// Updates float32 `master`, `exp_avg` and `exp_avg_sq` by a float32 or bfloat16 gradient (undefined: zeros;
// it is not changed), then rounds the master to `weight`, which may be the master itself. All are dense and
// of as many elements. The numbers of torch.optim.AdamW(fused=True) (Loshchilov & Hutter, arXiv 1711.05101).
void adamw_update(const at::Tensor& master, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                  const at::Tensor& gradient, const at::Tensor& weight, const AdamWStep& step);

}  // namespace caldera
