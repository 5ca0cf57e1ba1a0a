#include <cmath>
#include <limits>

#include "base/error.h"
#include "model/ops/accumulate.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

// nll = log(sum(exp(row))) - row[target]; with `gradient`, the row becomes scale * d nll / d row = scale *
// (softmax(row) - onehot(target)).
template <class V, class T>
CALDERA_INLINE void cross_entropy_rows(T* logits, const int64_t* targets, float* nll, int64_t rows,
                                       int64_t vocab, bool gradient, float scale) {
  for (int64_t r = 0; r < rows; ++r) {
    T* row = logits + r * vocab;
    const int64_t tail = vocab / kLanesOf<V> * kLanesOf<V>;
    V best = splat<V>(-std::numeric_limits<float>::infinity());
    for_each_vector<V>(
        tail, [&](const V& v) CALDERA_ALWAYS { best = simd::max(best, v); }, row);
    float top = maximum(best);
    for (int64_t i = tail; i < vocab; ++i) top = std::max(top, static_cast<float>(row[i]));
    V total = {};
    for_each_vector<V>(
        tail, [&](const V& v) CALDERA_ALWAYS { total += exp(v - top); }, row);
    float rest = 0;
    for (int64_t i = tail; i < vocab; ++i) rest += std::exp(static_cast<float>(row[i]) - top);
    const float log_total = std::log(sum(total) + rest) + top;
    nll[r] = log_total - static_cast<float>(row[targets[r]]);
    if (!gradient) continue;
    const float at_target = -std::expm1(-nll[r]);  // 1 - p, exact where p is almost 1
    map<V>(
        vocab, [=](const V& v) CALDERA_ALWAYS { return exp(v - log_total) * scale; }, row, row);
    row[targets[r]] = static_cast<T>(-at_target * scale);
  }
}

// logits [n, V] -> nll [n] float32; with `gradient`, logits become its gradient, times `scale` (a new tensor
// where no kernel takes them).
at::Tensor cross_entropy(at::Tensor& logits, const at::Tensor& targets, bool gradient, float scale = 1) {
  if (has_cpu_kernel(logits)) {
    at::Tensor nll = at::empty({logits.size(0)}, at::kFloat);
    with_cpu_type(logits, [&]<class T>(T*) {
      T* data = logits.mutable_data_ptr<T>();
      const int64_t* target_data = targets.const_data_ptr<int64_t>();
      float* nll_data = nll.mutable_data_ptr<float>();
      const int64_t vocab = logits.size(1);
      at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
        simd::run<CALDERA_EACH_WIDTH(cross_entropy_rows, T)>(
            data + begin * vocab, target_data + begin, nll_data + begin, end - begin, vocab, gradient, scale);
      });
    });
    return nll;
  }
  if (has_cuda_kernel(logits)) {
    at::Tensor nll = at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
    cuda::with_type(logits, [&]<class T>(T*, cuda::Stream stream) {
      cuda::cross_entropy(cuda::out<T>(logits), targets.const_data_ptr<int64_t>(), cuda::out<float>(nll),
                          logits.size(0), logits.size(1), gradient, scale, stream);
    });
    return nll;
  }
  const at::ScalarType dtype = logits.scalar_type();
  at::Tensor log_p = logits.to(dtype == at::kDouble ? at::kDouble : at::kFloat).log_softmax(-1);
  const at::Tensor index = targets.unsqueeze(1);
  const at::Tensor nll = -log_p.gather(1, index).squeeze(1);
  if (gradient) {
    log_p.exp_();
    log_p.scatter_add_(1, index, at::full_like(index, -1, log_p.options()));
    logits = log_p.mul_(scale).to(dtype);
  }
  return nll;
}

// Calls f(first row, number of rows) for each chunk.
template <class Function>
void for_each_chunk(const at::Tensor& hidden, const at::Tensor& weight, Function f) {
  const int64_t rows = hidden.size(0);
  const int64_t chunk =
      cross_entropy_chunk(rows, weight.size(0), static_cast<int64_t>(weight.element_size()));
  for (int64_t begin = 0; begin < rows; begin += chunk) f(begin, std::min(chunk, rows - begin));
}

void check(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets) {
  CALDERA_ASSERT(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1));
  CALDERA_ASSERT(targets.scalar_type() == at::kLong && targets.dim() == 1 &&
                 targets.size(0) == hidden.size(0));
  // On a GPU looking would wait for it; there such a target makes the loss NaN, and a step with that is
  // refused.
  if (!targets.device().is_cpu() || targets.numel() == 0) return;
  const int64_t low = targets.min().item<int64_t>(), high = targets.max().item<int64_t>(),
                vocab = weight.size(0);
  CALDERA_CHECK(low >= 0 && high < vocab, DataError,
                "target id {} lies outside the model's vocabulary of {} ids: the tokenizer does not belong "
                "to this model",
                low < 0 ? low : high, vocab);
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden_in, const at::Tensor& weight,
                            const at::Tensor& targets_in, double scale, bool wants_dhidden,
                            bool wants_dweight) {
    const at::Tensor hidden = hidden_in.contiguous(), targets = targets_in.contiguous();
    const bool gradient = wants_dhidden || wants_dweight;
    at::Tensor total = at::zeros({}, hidden.options().dtype(at::kFloat)), dhidden, dweight;
    if (wants_dhidden) dhidden = at::empty_like(hidden);
    for_each_chunk(hidden, weight, [&](int64_t begin, int64_t count) {
      const at::Tensor rows = hidden.narrow(0, begin, count);
      at::Tensor logits = matrix_product(rows, weight.t());
      total +=
          cross_entropy(logits, targets.narrow(0, begin, count), gradient, static_cast<float>(scale)).sum();
      // Not from a second packed copy of a frozen weight: of the largest matrix it would be the step's peak.
      if (wants_dhidden) matrix_product_into(logits, weight, dhidden.narrow(0, begin, count));
      if (!wants_dweight) return;
      if (count == hidden.size(0)) {
        dweight = matrix_product(logits.t(), rows);
      } else if (weight.scalar_type() == at::kFloat) {
        if (!dweight.defined()) dweight = at::zeros_like(weight);
        matrix_product_into(logits.t(), rows, dweight, /*accumulate=*/true);
      } else {  // each chunk's product is rounded once; their sum is kept in float32
        if (!dweight.defined()) dweight = at::zeros(weight.sizes(), weight.options().dtype(at::kFloat));
        accumulate_(dweight, matrix_product(logits.t(), rows));
      }
    });
    if (wants_dweight)
      dweight = dweight.defined() ? dweight.to(weight.scalar_type()) : at::zeros_like(weight);
    // Not save_for_backward: they are neither inputs nor outputs, and backward takes them away.
    ctx->saved_data["dhidden"] = dhidden;
    ctx->saved_data["dweight"] = dweight;
    return total * scale;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    // Where the loss itself is derived from this is 1: [V, D] is large. Looking would make the host wait for
    // a GPU.
    const bool is_one = grads[0].is_cpu() && grads[0].item<double>() == 1;
    const auto scaled = [&](const char* name) {
      at::Tensor gradient = std::exchange(ctx->saved_data[name], at::IValue()).toTensor();
      return gradient.defined() && !is_one ? gradient.mul_(grads[0]) : gradient;
    };
    CALDERA_CHECK(!ctx->saved_data["dhidden"].isNone(), Error,
                  "linear_cross_entropy: backward runs only once");
    at::Tensor dhidden = scaled("dhidden"), dweight = scaled("dweight");
    return {dhidden, dweight, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

int64_t cross_entropy_chunk(int64_t num_rows, int64_t vocab_size, int64_t bytes_each) {
  constexpr int64_t kBytes = 96 << 20;
  const int64_t most = std::max<int64_t>(64, kBytes / std::max<int64_t>(1, vocab_size * bytes_each));
  const int64_t num_chunks = std::max<int64_t>(1, (num_rows + most - 1) / most);
  return std::max<int64_t>(1, (num_rows + num_chunks - 1) / num_chunks);
}

at::Tensor linear_cross_entropy(const at::Tensor& hidden_ND, const at::Tensor& weight_VD,
                                const at::Tensor& targets_N, double scale) {
  CALDERA_PROFILED("linear_cross_entropy");
  check(hidden_ND, weight_VD, targets_N);
  return LinearCrossEntropyFunction::apply(hidden_ND, weight_VD, targets_N, scale, wants_grad(hidden_ND),
                                           wants_grad(weight_VD));
}

at::Tensor linear_nll(const at::Tensor& hidden_ND, const at::Tensor& weight_VD, const at::Tensor& targets_N) {
  check(hidden_ND, weight_VD, targets_N);
  const at::NoGradGuard no_grad;
  const at::Tensor hidden = hidden_ND.contiguous(), targets = targets_N.contiguous();
  at::Tensor nll = at::empty({hidden.size(0)}, hidden.options().dtype(at::kFloat));
  for_each_chunk(hidden, weight_VD, [&](int64_t begin, int64_t count) {
    at::Tensor logits = matrix_product(hidden.narrow(0, begin, count), weight_VD.t());
    nll.narrow(0, begin, count)
        .copy_(cross_entropy(logits, targets.narrow(0, begin, count), /*gradient=*/false));
  });
  return nll;
}

}  // namespace caldera
