#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"
#include "model/ops/simd.h"

// Legend: H query heads, G key/value heads, R = H / G, K head width, N query rows and L key rows of one
// sample.
namespace caldera {
namespace {

using namespace simd;

// Query rows whose scores exist at once: bounds memory, and lets causal attention skip the keys after the
// block.
constexpr int64_t kBlockRows = 256;
// Rows of queries and keys are filled up with zeros to multiples of 32, or of an eighth of their number, so
// that samples of many lengths share few shapes: the products' code is made for each shape anew.
int64_t filled(int64_t rows) {
  const auto eighth = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(rows)) / 8);
  const int64_t unit = std::max<int64_t>(32, eighth);
  return rows < unit ? rows : (rows + unit - 1) / unit * unit;
}

// In place: row r of scores [rows, L] belongs to query r % num_queries and becomes softmax(scale * row) over
// its keys, the first `first_limit` + r % num_queries of the `num_real` ones if causal, else these; zero
// beyond.
template <class T>
CALDERA_INLINE void softmax_each(T* scores, int64_t begin, int64_t end, int64_t num_queries, int64_t num_keys,
                                 int64_t num_real, float scale, bool causal, int64_t first_limit) {
  for (int64_t r = begin; r < end; ++r) {
    T* row = scores + r * num_keys;
    const int64_t limit = causal ? std::min(first_limit + r % num_queries, num_real) : num_real;
    Vec best = splat(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + kLanes <= limit; i += kLanes) best = simd::max(best, load(row + i));
    float top = maximum(best);
    for (int64_t j = i; j < limit; ++j) top = std::max(top, static_cast<float>(row[j]));
    Vec total = {};
    for (i = 0; i < limit; i += kLanes) {
      const int64_t n = std::min(kLanes, limit - i);
      // Lanes beyond n read 0 and may not count: -inf makes exp zero.
      Vec x = (load(row + i, n) - top) * scale;
      for (int64_t j = n; j < kLanes; ++j) x[j] = -std::numeric_limits<float>::infinity();
      total += exp(x);
    }
    const float log_total = std::log(sum(total));
    for (i = 0; i < limit; i += kLanes) {
      const int64_t n = std::min(kLanes, limit - i);
      store(row + i, exp((load(row + i, n) - top) * scale - log_total), n);
    }
    for (i = limit; i < num_keys; ++i) row[i] = static_cast<T>(0.0f);
  }
}

// In place, from probabilities p and dp = dL/dp: dp becomes dL/d(q . k) = scale * p * (dp - sum(p * dp)).
template <class T>
CALDERA_INLINE void softmax_backward_each(const T* p, T* dp, int64_t rows, int64_t num_keys, float scale) {
  for (int64_t r = 0; r < rows; ++r, p += num_keys, dp += num_keys) {
    Vec products = {};
    for (int64_t i = 0; i < num_keys; i += kLanes) {
      const int64_t n = std::min(kLanes, num_keys - i);
      products += load(p + i, n) * load(dp + i, n);
    }
    const float mean = sum(products);
    for (int64_t i = 0; i < num_keys; i += kLanes) {
      const int64_t n = std::min(kLanes, num_keys - i);
      store(dp + i, scale * load(p + i, n) * (load(dp + i, n) - mean), n);
    }
  }
}

CALDERA_SIMD void softmax_rows(float* scores, int64_t begin, int64_t end, int64_t num_queries,
                               int64_t num_keys, int64_t num_real, float scale, bool causal,
                               int64_t first_limit) {
  softmax_each(scores, begin, end, num_queries, num_keys, num_real, scale, causal, first_limit);
}
CALDERA_SIMD void softmax_rows(c10::BFloat16* scores, int64_t begin, int64_t end, int64_t num_queries,
                               int64_t num_keys, int64_t num_real, float scale, bool causal,
                               int64_t first_limit) {
  softmax_each(scores, begin, end, num_queries, num_keys, num_real, scale, causal, first_limit);
}
CALDERA_SIMD void softmax_backward_rows(const float* p, float* dp, int64_t rows, int64_t num_keys,
                                        float scale) {
  softmax_backward_each(p, dp, rows, num_keys, scale);
}
CALDERA_SIMD void softmax_backward_rows(const c10::BFloat16* p, c10::BFloat16* dp, int64_t rows,
                                        int64_t num_keys, float scale) {
  softmax_backward_each(p, dp, rows, num_keys, scale);
}

// One query row q [H, K] against keys and values [L, G, K], read where they lie in the cache. p [L] is
// scratch.
template <class T>
CALDERA_INLINE void attend_one_each(const T* q, const T* k, const T* v, T* out, float* p, int64_t num_keys,
                                    int64_t H, int64_t G, int64_t K) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(K));
  for (int64_t h = 0; h < H; ++h, q += K, out += K) {
    const int64_t head = h / (H / G) * K;
    for (int64_t j = 0; j < num_keys; ++j) {
      const T* key = k + j * G * K + head;
      Vec products = {};
      for (int64_t i = 0; i < K; i += kLanes) {
        const int64_t n = std::min(kLanes, K - i);
        products += load(q + i, n) * load(key + i, n);
      }
      p[j] = sum(products);
    }
    softmax_each(p, 0, 1, 1, num_keys, num_keys, scale, /*causal=*/false, 0);
    for (int64_t i = 0; i < K; i += kLanes) {
      const int64_t n = std::min(kLanes, K - i);
      Vec total = {};
      for (int64_t j = 0; j < num_keys; ++j) total += p[j] * load(v + j * G * K + head + i, n);
      store(out + i, total, n);
    }
  }
}

CALDERA_SIMD void attend_one(const float* q, const float* k, const float* v, float* out, float* p,
                             int64_t num_keys, int64_t H, int64_t G, int64_t K) {
  attend_one_each(q, k, v, out, p, num_keys, H, G, K);
}
CALDERA_SIMD void attend_one(const c10::BFloat16* q, const c10::BFloat16* k, const c10::BFloat16* v,
                             c10::BFloat16* out, float* p, int64_t num_keys, int64_t H, int64_t G,
                             int64_t K) {
  attend_one_each(q, k, v, out, p, num_keys, H, G, K);
}

// [L, G, K] -> [G, rows, K], dense; rows beyond L are zero.
at::Tensor heads_first(const at::Tensor& x, int64_t rows) {
  if (rows == x.size(0)) return x.transpose(0, 1).contiguous();
  const at::Tensor filled_up = at::zeros({x.size(1), rows, x.size(2)}, x.options().requires_grad(false));
  filled_up.narrow(1, 0, x.size(0)).copy_(x.transpose(0, 1));
  return filled_up;
}
// [N, H, K] -> [G, R * rows, K], dense: all queries of a key head in one matrix, so that keys and values are
// never repeated; of each head, rows beyond N are zero.
at::Tensor group_heads(const at::Tensor& q, int64_t G, int64_t rows) {
  const int64_t N = q.size(0), R = q.size(1) / G, K = q.size(2);
  const at::Tensor heads = q.unflatten(1, {G, R}).permute({1, 2, 0, 3});
  if (rows == N) return heads.reshape({G, R * N, K});
  const at::Tensor filled_up = at::zeros({G, R, rows, K}, q.options().requires_grad(false));
  filled_up.narrow(2, 0, N).copy_(heads);
  return filled_up.view({G, R * rows, K});
}
// The reverse of group_heads, into out [N, H, K].
void ungroup_heads(const at::Tensor& grouped, const at::Tensor& out, int64_t rows) {
  const int64_t N = out.size(0), G = grouped.size(0), K = out.size(2);
  out.unflatten(1, {G, out.size(1) / G})
      .copy_(grouped.view({G, -1, rows, K}).narrow(2, 0, N).permute({2, 0, 1, 3}));
}

// One sample's attention on CPU; its N queries are the last of the L rows that keys and values have.
class SampleAttention {
 public:
  SampleAttention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal)
      : q_(q),
        k_GLK_(heads_first(k, filled(k.size(0)))),
        v_GLK_(heads_first(v, filled(k.size(0)))),
        causal_(causal),
        N_(q.size(0)),
        L_(k.size(0)),
        G_(k.size(1)),
        scale_(1.0f / std::sqrt(static_cast<float>(q.size(2)))) {}

  void forward(const at::Tensor& out) const {
    for (int64_t begin = 0; begin < N_; begin += kBlockRows) {
      const int64_t count = std::min(kBlockRows, N_ - begin), rows = filled(count);
      const int64_t keys = num_keys(begin + count), columns = filled(keys);
      const at::Tensor p =
          probabilities(group_heads(q_.narrow(0, begin, count), G_, rows), begin, rows, keys);
      ungroup_heads(matrix_product(p, v_GLK_.narrow(1, 0, columns)), out.narrow(0, begin, count), rows);
    }
  }

  // Scores are computed again: cheaper than keeping [H, L, L] for every layer.
  void backward(const at::Tensor& d_out, const at::Tensor& dq, const at::Tensor& dk,
                const at::Tensor& dv) const {
    at::Tensor dk_GLK, dv_GLK;
    if (N_ > kBlockRows) {  // sums over blocks are kept in float32
      dk_GLK = at::zeros(k_GLK_.sizes(), at::kFloat);
      dv_GLK = at::zeros(v_GLK_.sizes(), at::kFloat);
    }
    for (int64_t begin = 0; begin < N_; begin += kBlockRows) {
      const int64_t count = std::min(kBlockRows, N_ - begin), rows = filled(count);
      const int64_t keys = num_keys(begin + count), columns = filled(keys);
      const at::Tensor q = group_heads(q_.narrow(0, begin, count), G_, rows);
      const at::Tensor d_o = group_heads(d_out.narrow(0, begin, count), G_, rows);
      const at::Tensor p = probabilities(q, begin, rows, keys);
      at::Tensor ds = matrix_product(d_o, v_GLK_.narrow(1, 0, columns).transpose(1, 2));
      with_cpu_type(ds, [&]<class T>(T*) {
        softmax_backward_rows(p.const_data_ptr<T>(), ds.mutable_data_ptr<T>(), ds.size(0) * ds.size(1),
                              columns, scale_);
      });
      ungroup_heads(matrix_product(ds, k_GLK_.narrow(1, 0, columns)), dq.narrow(0, begin, count), rows);
      accumulate(dk_GLK, matrix_product(ds.transpose(1, 2), q), columns);
      accumulate(dv_GLK, matrix_product(p.transpose(1, 2), d_o), columns);
    }
    dk.copy_(dk_GLK.narrow(1, 0, L_).transpose(0, 1));
    dv.copy_(dv_GLK.narrow(1, 0, L_).transpose(0, 1));
  }

 private:
  int64_t num_keys(int64_t end) const { return causal_ ? L_ - N_ + end : L_; }

  // Of `rows` queries a head, filled up; [G, R * rows, filled(keys)].
  at::Tensor probabilities(const at::Tensor& q, int64_t begin, int64_t rows, int64_t keys) const {
    at::Tensor p = matrix_product(q, k_GLK_.narrow(1, 0, filled(keys)).transpose(1, 2));
    with_cpu_type(p, [&]<class T>(T*) {
      T* data = p.mutable_data_ptr<T>();
      at::parallel_for(0, p.size(0) * p.size(1), row_grain(p.size(2)), [&](int64_t first, int64_t last) {
        softmax_rows(data, first, last, rows, p.size(2), keys, scale_, causal_, L_ - N_ + begin + 1);
      });
    });
    return p;
  }

  static void accumulate(at::Tensor& total, const at::Tensor& part, int64_t columns) {
    if (total.defined())
      total.narrow(1, 0, columns).add_(part);
    else
      total = part;
  }

  const at::Tensor q_, k_GLK_, v_GLK_;
  const bool causal_;
  const int64_t N_, L_, G_;
  const float scale_;
};

// Runs f(0) .. f(count - 1), each on one thread while the matrix products inside stay serial; where that
// would leave threads idle, or there are too few elements to share, one after another.
template <class Function>
void for_each_sample(int64_t count, int64_t num_elements, Function f) {
  const int64_t threads = at::get_num_threads();
  if (count < threads || num_elements < row_grain(1)) {
    for (int64_t s = 0; s < count; ++s) f(s);
    return;
  }
  std::atomic<int64_t> next = 0;  // samples differ in length, so they are handed out one by one
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const at::NoGradGuard no_grad;  // the setting is per thread
    for (int64_t s = next++; s < count; s = next++) f(s);
  });
}

struct PackedAttentionFunction : torch::autograd::Function<PackedAttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const std::vector<int64_t>& cu_seqlens, bool causal) {
    at::Tensor out = at::empty(q.sizes(), q.options());
    for_each_sample(static_cast<int64_t>(cu_seqlens.size()) - 1, q.numel(), [&](int64_t s) {
      const auto rows = [&](const at::Tensor& x) { return slice(x, cu_seqlens, s); };
      SampleAttention(rows(q), rows(k), rows(v), causal).forward(rows(out));
    });
    ctx->save_for_backward({q, k, v});
    ctx->saved_data["cu_seqlens"] = cu_seqlens;
    ctx->saved_data["causal"] = causal;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const std::vector<int64_t> cu_seqlens = ctx->saved_data["cu_seqlens"].toIntVector();
    const bool causal = ctx->saved_data["causal"].toBool();
    at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
               dv = at::empty(v.sizes(), v.options());
    for_each_sample(static_cast<int64_t>(cu_seqlens.size()) - 1, q.numel(), [&](int64_t s) {
      const auto rows = [&](const at::Tensor& x) { return slice(x, cu_seqlens, s); };
      SampleAttention(rows(q), rows(k), rows(v), causal)
          .backward(rows(grads[0]), rows(dq), rows(dk), rows(dv));
    });
    return {dq, dk, dv, at::Tensor(), at::Tensor()};
  }

  static at::Tensor slice(const at::Tensor& x, const std::vector<int64_t>& cu_seqlens, int64_t s) {
    const auto i = static_cast<size_t>(s);
    return x.narrow(0, cu_seqlens[i], cu_seqlens[i + 1] - cu_seqlens[i]);
  }
};

// One sample through ATen's own attention, for every device and dtype.
at::Tensor plain_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  const int64_t N = q.size(0), L = k.size(0), R = q.size(1) / k.size(1);
  const auto batched = [](const at::Tensor& x, int64_t repeats) {
    const at::Tensor heads = x.transpose(0, 1).unsqueeze(0);
    return repeats == 1 ? heads : heads.repeat_interleave(repeats, 1);
  };
  std::optional<at::Tensor> mask;
  if (causal && N > 1 && L > N)
    mask = at::ones({N, L}, q.options().dtype(at::kBool))
               .tril(L - N);  // ATen aligns its causal mask to the first key
  return at::scaled_dot_product_attention(batched(q, 1), batched(k, R), batched(v, R), mask, 0.0,
                                          causal && N > 1 && N == L)
      .squeeze(0)
      .transpose(0, 1);
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
  std::vector<at::Tensor> outputs;
  for (size_t s = 0; s < num_samples; ++s) {
    const auto rows = [&](const at::Tensor& x) {
      return x.narrow(0, cu_seqlens[s], cu_seqlens[s + 1] - cu_seqlens[s]);
    };
    outputs.push_back(plain_attention(rows(q_THK), rows(k_TGK), rows(v_TGK), causal));
  }
  return outputs.empty() ? q_THK : at::cat(outputs);
}

at::Tensor cached_attention(const at::Tensor& q_THK, const std::vector<at::Tensor>& keys,
                            const std::vector<at::Tensor>& values, const std::vector<int64_t>& cu_seqlens) {
  check_shapes(q_THK, cu_seqlens);
  CALDERA_ASSERT(keys.size() == cu_seqlens.size() - 1 && values.size() == keys.size());
  const at::Tensor q = q_THK.contiguous();
  at::Tensor out = at::empty_like(q);
  int64_t num_elements = 0;
  for (const at::Tensor& key : keys) num_elements += key.numel();
  for_each_sample(static_cast<int64_t>(keys.size()), num_elements, [&](int64_t s) {
    const auto i = static_cast<size_t>(s);
    const int64_t begin = cu_seqlens[i], count = cu_seqlens[i + 1] - begin;
    const at::Tensor q_s = q.narrow(0, begin, count), out_s = out.narrow(0, begin, count), &k = keys[i],
                     &v = values[i];
    if (!has_cpu_kernel(q)) {
      out_s.copy_(plain_attention(q_s, k, v, /*causal=*/true));
    } else if (count == 1 && k.is_contiguous() && v.is_contiguous()) {
      std::vector<float> scratch(static_cast<size_t>(k.size(0)));
      with_cpu_type(q, [&]<class T>(T*) {
        attend_one(q_s.const_data_ptr<T>(), k.const_data_ptr<T>(), v.const_data_ptr<T>(),
                   out_s.mutable_data_ptr<T>(), scratch.data(), k.size(0), q.size(1), k.size(1), q.size(2));
      });
    } else {
      SampleAttention(q_s, k, v, /*causal=*/true).forward(out_s);
    }
  });
  return out;
}

}  // namespace caldera
