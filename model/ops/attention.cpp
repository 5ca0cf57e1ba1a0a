#include "base/error.h"
#include "model/ops/attend_one.h"
#include "model/ops/attention_cpu.h"
#include "model/ops/autograd.h"
#include "model/ops/ops.h"

#include <algorithm>

// Legend: H query heads, G key/value heads, R = H / G, K head width, N query rows and L key rows of one
// sample.
namespace caldera {
namespace {

at::Tensor slice(const at::Tensor& x, const std::vector<int64_t>& cu_seqlens, size_t s) {
  return x.narrow(0, cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s]);
}

AttentionRows rows_of(const at::Tensor& x, const std::vector<int64_t>& cu_seqlens, size_t s) {
  return {x, cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s]};
}

struct PackedAttentionFunction : torch::autograd::Function<PackedAttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const std::vector<int64_t>& cu_seqlens, bool causal) {
    at::Tensor out = at::empty(q.sizes(), q.options());
    std::vector<AttentionRows> outputs;
    for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) outputs.push_back(rows_of(out, cu_seqlens, s));
    attend(samples_of(q, k, v, cu_seqlens), outputs, causal);
    ctx->save_for_backward({q, k, v});
    ctx->saved_data["cu_seqlens"] = cu_seqlens;
    ctx->saved_data["causal"] = causal;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], d_out = grads[0].contiguous();
    const std::vector<int64_t> cu_seqlens = ctx->saved_data["cu_seqlens"].toIntVector();
    const at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
                     dv = at::empty(v.sizes(), v.options());
    std::vector<AttentionGradients> gradients;
    for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s)
      gradients.push_back({rows_of(d_out, cu_seqlens, s), rows_of(dq, cu_seqlens, s), rows_of(dk, cu_seqlens, s),
                           rows_of(dv, cu_seqlens, s)});
    attend_backward(samples_of(q, k, v, cu_seqlens), gradients, ctx->saved_data["causal"].toBool());
    return {dq, dk, dv, at::Tensor(), at::Tensor()};
  }

  static std::vector<AttentionSample> samples_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                 const std::vector<int64_t>& cu_seqlens) {
    std::vector<AttentionSample> samples;
    for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s)
      samples.push_back({rows_of(q, cu_seqlens, s), rows_of(k, cu_seqlens, s), rows_of(v, cu_seqlens, s)});
    return samples;
  }
};

// Samples of one length through ATen's own attention, for every device and dtype. q [S, N, H, K], k and v [S, L, G, K].
at::Tensor plain_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  const int64_t N = q.size(1), L = k.size(1), R = q.size(2) / k.size(2);
  const auto heads = [R](const at::Tensor& x) {
    return R == 1 ? x.transpose(1, 2) : x.transpose(1, 2).repeat_interleave(R, 1);
  };
  std::optional<at::Tensor> mask;
  if (causal && N > 1 && L > N)
    mask = at::ones({N, L}, q.options().dtype(at::kBool))
               .tril(L - N);  // ATen aligns its causal mask to the first key
  return at::scaled_dot_product_attention(q.transpose(1, 2), heads(k), heads(v), mask, 0.0,
                                          causal && N > 1 && N == L)
      .transpose(1, 2);
}

// The offsets as the varlen kernel wants them. Every layer asks for the same ones: copied to the device once.
at::Tensor device_offsets(const std::vector<int64_t>& cu_seqlens, at::Device device) {
  thread_local std::vector<int64_t> last_offsets;
  thread_local at::Tensor last_tensor;
  if (!last_tensor.defined() || last_tensor.device() != device || last_offsets != cu_seqlens) {
    last_tensor = at::tensor(cu_seqlens, at::kInt).to(device);
    last_offsets = cu_seqlens;
  }
  return last_tensor;
}

void check_shapes(const at::Tensor& q, const std::vector<int64_t>& cu_seqlens) {
  CALDERA_ASSERT(q.dim() == 3 && !cu_seqlens.empty() && cu_seqlens.front() == 0 &&
                 cu_seqlens.back() == q.size(0));
}

}  // namespace

at::Tensor packed_attention(const at::Tensor& q_THK, const at::Tensor& k_TGK, const at::Tensor& v_TGK,
                            const std::vector<int64_t>& cu_seqlens, bool causal) {
  CALDERA_PROFILED("packed_attention");
  check_shapes(q_THK, cu_seqlens);
  CALDERA_ASSERT(q_THK.size(1) % k_TGK.size(1) == 0 && k_TGK.sizes() == v_TGK.sizes());
  if (has_cpu_kernel(q_THK)) return PackedAttentionFunction::apply(q_THK, k_TGK, v_TGK, cu_seqlens, causal);
  const size_t num_samples = cu_seqlens.size() - 1;
  const bool half = q_THK.scalar_type() == at::kBFloat16 || q_THK.scalar_type() == at::kHalf;
  if (q_THK.device().is_cuda() && half && q_THK.size(2) % 8 == 0 && q_THK.size(2) <= 256 && num_samples > 0) {
    int64_t longest = 0;
    for (size_t s = 0; s < num_samples; ++s) longest = std::max(longest, cu_seqlens[s + 1] - cu_seqlens[s]);
    const at::Tensor offsets = device_offsets(cu_seqlens, q_THK.device());
    return std::get<0>(at::_flash_attention_forward(q_THK, k_TGK, v_TGK, offsets, offsets, longest, longest,
                                                    /*dropout_p=*/0.0, causal, /*return_debug_mask=*/false));
  }
  if (num_samples == 0) return q_THK;
  const int64_t length = cu_seqlens[1];
  bool is_uniform = true;
  for (size_t s = 0; s < num_samples; ++s) is_uniform = is_uniform && cu_seqlens[s + 1] - cu_seqlens[s] == length;
  const auto batched = [](const at::Tensor& x, int64_t n) { return x.unflatten(0, {-1, n}); };
  if (is_uniform && length > 0)
    return plain_attention(batched(q_THK, length), batched(k_TGK, length), batched(v_TGK, length), causal)
        .flatten(0, 1);
  std::vector<at::Tensor> outputs;
  for (size_t s = 0; s < num_samples; ++s) {
    const auto rows = [&](const at::Tensor& x) { return slice(x, cu_seqlens, s).unsqueeze(0); };
    outputs.push_back(plain_attention(rows(q_THK), rows(k_TGK), rows(v_TGK), causal).squeeze(0));
  }
  return at::cat(outputs);
}

at::Tensor cached_attention(const at::Tensor& q_THK, const std::vector<at::Tensor>& keys,
                            const std::vector<at::Tensor>& values, const std::vector<int64_t>& cu_seqlens) {
  check_shapes(q_THK, cu_seqlens);
  CALDERA_ASSERT(keys.size() == cu_seqlens.size() - 1 && values.size() == keys.size());
  const at::Tensor q = q_THK.contiguous();
  at::Tensor out = at::empty_like(q);
  if (!has_cpu_kernel(q)) {
    for (size_t s = 0; s < keys.size(); ++s)
      slice(out, cu_seqlens, s)
          .copy_(plain_attention(slice(q, cu_seqlens, s).unsqueeze(0), keys[s].unsqueeze(0), values[s].unsqueeze(0),
                                 /*causal=*/true)
                     .squeeze(0));
    return out;
  }
  std::vector<AttentionSample> samples;
  std::vector<AttentionRows> outputs;
  bool one_each = true;
  for (size_t s = 0; s < keys.size(); ++s) {
    samples.push_back({rows_of(q, cu_seqlens, s), {keys[s], 0, keys[s].size(0)}, {values[s], 0, values[s].size(0)}});
    outputs.push_back(rows_of(out, cu_seqlens, s));
    one_each = one_each && samples[s].q.count == 1 && samples[s].k.is_dense() && samples[s].v.is_dense();
  }
  one_each ? attend_one_query(samples, outputs) : attend(samples, outputs, /*causal=*/true);
  return out;
}

}  // namespace caldera
