// Softmax attention of packed samples on the CPU, one task for each sample and key head. The products run on oneDNN's
// inner kernel through LibTorch, or by our own where matrices are multiplied that way (product_way.h), on blocks of
// queries whose scores stay in the core's cache, in float32; bfloat16 factors are multiplied as they are where the
// processor does that faster (product_way.h), with float32 sums.
#pragma once

#include <vector>

#include "base/aten.h"

namespace caldera {

// Rows [begin, begin + count) of x [T, heads, width], float32 or bfloat16, the last dimension dense. x must outlive it: a
// step looks at thousands of these, and a tensor takes a microsecond to make.
struct AttentionRows {
  AttentionRows(const at::Tensor& x, int64_t begin, int64_t count);
  void* data;
  at::ScalarType dtype;
  int64_t count, heads, width, row_stride, head_stride;  // strides in elements
  int64_t num_elements() const { return count * heads * width; }
  bool is_dense() const {
    return (heads == 1 || head_stride == width) && (count == 1 || row_stride == heads * width);
  }
};

// One sample: q [N, H, K] are the last of its L rows; k, v [L, G, K] with G dividing H. All of one dtype.
struct AttentionSample {
  AttentionRows q, k, v;
};

// out[i] [N, H, K] = softmax(q k^T / sqrt(K)) v, each query over the keys up to its own place if causal.
void attend(const std::vector<AttentionSample>& samples, const std::vector<AttentionRows>& out, bool causal);

// Of dL/dout, dL/dq, dL/dk and dL/dv are written. Scores are computed again: cheaper than keeping [H, N, L].
struct AttentionGradients {
  AttentionRows d_out, dq, dk, dv;
};
void attend_backward(const std::vector<AttentionSample>& samples, const std::vector<AttentionGradients>& gradients,
                     bool causal);

}  // namespace caldera
