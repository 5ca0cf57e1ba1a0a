// Attention within each sample of the packed row in which a query sees its last `window` tokens alone, its
// own included (Mistral 7B, arXiv 2310.06825; transformers' sliding_attention).
#pragma once

#include <cstdint>
#include <vector>

#include "base/aten.h"

namespace caldera {

// As packed_attention(..., causal) where no sample is longer than the window, or the window is 0.
at::Tensor windowed_attention(const at::Tensor& q_THK, const at::Tensor& k_TGK, const at::Tensor& v_TGK,
                              const std::vector<int64_t>& cu_seqlens, int64_t window);
// As cached_attention: the queries of a sample are its last rows.
at::Tensor cached_windowed_attention(const at::Tensor& q_THK, const std::vector<at::Tensor>& keys,
                                     const std::vector<at::Tensor>& values,
                                     const std::vector<int64_t>& cu_seqlens, int64_t window);

}  // namespace caldera
