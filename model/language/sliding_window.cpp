#include "model/language/sliding_window.h"

#include "model/ops/ops.h"

// Legend: N queries of a sample, L keys (N of them its own), H query heads, G key/value heads, K head width.
namespace caldera {
namespace {

// One sample by a mask over all its keys: plain, and only where a sample outgrows the window.
at::Tensor masked_attention(const at::Tensor& q_NHK, const at::Tensor& k_LGK, const at::Tensor& v_LGK,
                            int64_t window) {
  const int64_t N = q_NHK.size(0), L = k_LGK.size(0), R = q_NHK.size(1) / k_LGK.size(1);
  const at::Tensor mask_NL =
      at::ones({N, L}, q_NHK.options().dtype(at::kBool)).tril(L - N).triu(L - N - window + 1);
  const auto heads = [](const at::Tensor& x, int64_t repeats) {
    return x.transpose(0, 1).repeat_interleave(repeats, 0).unsqueeze(0);
  };
  return at::scaled_dot_product_attention(heads(q_NHK, 1), heads(k_LGK, R), heads(v_LGK, R), mask_NL)
      .squeeze(0)
      .transpose(0, 1);
}

bool any_longer(const std::vector<int64_t>& cu_seqlens, int64_t window) {
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s)
    if (cu_seqlens[s + 1] - cu_seqlens[s] > window) return true;
  return false;
}

}  // namespace

at::Tensor windowed_attention(const at::Tensor& q_THK, const at::Tensor& k_TGK, const at::Tensor& v_TGK,
                              const std::vector<int64_t>& cu_seqlens, int64_t window) {
  if (window == 0 || !any_longer(cu_seqlens, window))
    return packed_attention(q_THK, k_TGK, v_TGK, cu_seqlens, /*causal=*/true);
  std::vector<at::Tensor> outputs;
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
    const auto rows = [&](const at::Tensor& x) {
      return x.narrow(0, cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s]);
    };
    outputs.push_back(masked_attention(rows(q_THK), rows(k_TGK), rows(v_TGK), window));
  }
  return at::cat(outputs);
}

at::Tensor cached_windowed_attention(const at::Tensor& q_THK, const std::vector<at::Tensor>& keys,
                                     const std::vector<at::Tensor>& values,
                                     const std::vector<int64_t>& cu_seqlens, int64_t window) {
  if (window == 0) return cached_attention(q_THK, keys, values, cu_seqlens);
  // A lone query needs no mask, only the last keys.
  bool all_lone = true;
  for (size_t s = 0; s < keys.size(); ++s) all_lone = all_lone && cu_seqlens[s + 1] - cu_seqlens[s] == 1;
  std::vector<at::Tensor> outputs, last_keys, last_values;
  for (size_t s = 0; s < keys.size(); ++s) {
    const int64_t count = std::min(keys[s].size(0), window), begin = keys[s].size(0) - count;
    if (all_lone) {
      last_keys.push_back(keys[s].narrow(0, begin, count));
      last_values.push_back(values[s].narrow(0, begin, count));
    } else {
      const at::Tensor q = q_THK.narrow(0, cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s]);
      outputs.push_back(masked_attention(q, keys[s], values[s], window));
    }
  }
  return all_lone ? cached_attention(q_THK, last_keys, last_values, cu_seqlens) : at::cat(outputs);
}

}  // namespace caldera
