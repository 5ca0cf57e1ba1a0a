// Sums of tensors in float32.
#pragma once
#include "base/aten.h"

namespace caldera {

// sum += part, without gradients; `sum` float32 and dense, `part` of as many elements. Where that is
// bfloat16, ATen on the CPU would first make a float32 copy of it, as large as the sum.
void accumulate_(const at::Tensor& sum, const at::Tensor& part);

}  // namespace caldera
