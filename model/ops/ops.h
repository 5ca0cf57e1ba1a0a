// The operations that the model is built from, on packed rows. Each works on CPU and CUDA, in float32 and
// bfloat16, and is differentiable. Legend: T tokens in the packed row, S samples, D model width, H query
// heads, G key/value heads, K head width, V vocabulary, N supervised rows.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "base/aten.h"

namespace caldera {

class HostCopies;

// x * rsqrt(mean(x^2) + eps) * weight, mean in float32. x [..., D], weight [D] -> [..., D]. As HF
// LlamaRMSNorm.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

// What half of a block begins with, and the residual that goes past it to its end.
struct WithResidual {
  at::Tensor value, residual;
};
// residual + update, rounded to their dtype, and as value the rms_norm of that, in one pass over memory; backward adds the
// residual's gradient to the norm's in the same way. Without an update the residual goes on as it is.
WithResidual add_rms_norm(const at::Tensor& residual, const at::Tensor& update, const at::Tensor& weight, double eps);

// Rotary tables for the given positions. inv_freq [K / 2] float32; positions_T int64 -> cos, sin [T, K]
// float32 (HF's "half" layout: the two halves of K repeat), times `scaling` (attention factor; 1 for plain
// rope).
struct Rotary {
  at::Tensor cos_TK, sin_TK;
};
Rotary rotary_tables(const at::Tensor& inv_freq, const at::Tensor& positions_T, double scaling,
                     at::ScalarType dtype);
// x [T, H, K] rotated by position: x * cos + rotate_half(x) * sin.
at::Tensor apply_rotary(const at::Tensor& x_THK, const Rotary& rotary);
// The fused projection's rows qkv [T, (H + 2G) K] as q [T, H, K] and k [T, G, K], rotated, and v [T, G, K]. Their
// gradients are written into one such row each; of qkv itself backward keeps nothing.
std::array<at::Tensor, 3> split_rotary(const at::Tensor& qkv, int64_t num_heads, int64_t num_kv_heads,
                                       const Rotary& rotary);

// SwiGLU: silu(gate) * up of the fused projection's output [T, 2F] (gate first) -> [T, F].
at::Tensor swiglu(const at::Tensor& gate_up);

// Quick GELU, the activation of CLIP: x * sigmoid(1.702 x). Without a graph x itself may take the result.
at::Tensor quick_gelu(at::Tensor x);

// Attention within each sample of the packed row. q [T, H, K]; k, v [T, G, K] with G dividing H; row offsets
// cu_seqlens (S + 1). Softmax scale 1 / sqrt(K). -> [T, H, K].
at::Tensor packed_attention(const at::Tensor& q_THK, const at::Tensor& k_TGK, const at::Tensor& v_TGK,
                            const std::vector<int64_t>& cu_seqlens, bool causal);

// The same for generation, without gradients: the queries of sample s are its *last* rows, and see the keys
// and values keys[s], values[s] [L_s, G, K] (its own included) up to their own place.
at::Tensor cached_attention(const at::Tensor& q_THK, const std::vector<at::Tensor>& keys,
                            const std::vector<at::Tensor>& values, const std::vector<int64_t>& cu_seqlens);

// What is zeroed of a matrix, with probability p. `keys_T` (int64) says what each row is (dropout_keys(),
// model/lora.h), wherever it lies: the mask does not depend on what is packed beside it.
struct Dropout {
  double p = 0;
  at::Tensor keys_T;
};
// x [T, I] with elements zeroed, the others scaled by 1 / (1 - p). The mask is a hash of the row's key, the
// seed and the column: the same on every device and in every dtype, so backward makes it again. No gradients.
at::Tensor dropped_out(const at::Tensor& x_TI, const Dropout& dropout, uint64_t seed);

// A low-rank adapter's part of a linear layer's result: rows [first_row, first_row + O) of the whole.
struct LowRankUpdate {
  at::Tensor a_RI, b_OR;
  int64_t first_row = 0;
  uint64_t dropout_seed = 0;
};
// y[:, rows of each update] += B A dropout(x) * scaling; y [T, all rows] is changed in place and returned. x
// [T, I]. Each update has a mask of its own, by its seed. Backward keeps x and A dropout(x). Without
// `needs_value` y is left as it is, and has its graph (see recompute()).
at::Tensor add_low_rank_(const at::Tensor& y_TO, const at::Tensor& x_TI,
                         const std::vector<LowRankUpdate>& updates, double scaling, const Dropout& dropout,
                         bool needs_value);

// `scale` times the sum over the N rows of -log softmax(hidden . weight^T)[target], in float32: output projection and
// cross entropy in one, in chunks of rows, so that [N, V] is never held. hidden [N, D], weight [V, D], targets
// int64 [N] -> scalar float32. Forward computes the gradients as well (where they are wanted); on the CPU
// what is derived from this value itself needs no other pass over them.
at::Tensor linear_cross_entropy(const at::Tensor& hidden_ND, const at::Tensor& weight_VD,
                                const at::Tensor& targets_N, double scale = 1);
// Rows of a chunk: as few chunks of equal size as hold no more than 96 MiB of logits each. Products run at full speed
// so, and most micro-batches need one chunk.
int64_t cross_entropy_chunk(int64_t num_rows, int64_t vocab_size, int64_t bytes_each);
// The same without gradients, per row: -> float32 [N].
at::Tensor linear_nll(const at::Tensor& hidden_ND, const at::Tensor& weight_VD, const at::Tensor& targets_N);

// block(x, true), of which nothing but x is kept for backward: there the block runs again (Chen et al., arXiv
// 1604.06174) as block(x, false), for the graph of its result alone: a last product whose numbers nobody reads may
// be left out. `parameters` are the leaves that the block uses. Gradients are bit for bit those of block(x, true) on
// CPU. `hold`, where given, is called before the block runs, in either pass; what it returns lives as long as the
// block's weights are needed there. With `host` x waits there for backward, which must come to blocks that share it in
// the opposite order.
at::Tensor recompute(std::function<at::Tensor(const at::Tensor& x, bool needs_value)> block, const at::Tensor& x,
                     const std::vector<at::Tensor>& parameters,
                     std::function<std::shared_ptr<void>()> hold = {}, std::shared_ptr<HostCopies> host = {});

// affine(make(source), weight, bias) (matmul.h) of whose input nothing but `source` is kept for backward: there it
// is made again. For what is cheap beside the product and has no leaves of its own: gates and activations. Bit for bit the
// plain composition. `needs_value` and `in_float8` as affine's.
at::Tensor affine_of(const std::function<at::Tensor(const at::Tensor& source)>& make, const at::Tensor& source,
                     const at::Tensor& weight, const at::Tensor& bias = {}, bool needs_value = true,
                     bool in_float8 = false);
// The same of add_rms_norm(residual, update, norm, eps).value, beside its residual, which alone is kept.
WithResidual affine_of_norm(const at::Tensor& residual, const at::Tensor& update, const at::Tensor& norm, double eps,
                            const at::Tensor& weight, const at::Tensor& bias = {}, bool in_float8 = false);

// The square root of the sum of all squares, read once: -> scalar float32 on x's device. No gradients.
at::Tensor vector_norm(const at::Tensor& x);

}  // namespace caldera
