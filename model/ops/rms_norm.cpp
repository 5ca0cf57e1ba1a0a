#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/ops.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

// Rows whose weight gradients are summed before the sums are added up. Fixed, so that the number of threads
// changes no bit.
constexpr int64_t kRowsPerTask = 64;

// `update` and `sum`: null, or x + update is written to `sum` and takes x's place.
template <class V, class T>
CALDERA_INLINE void rms_forward(const T* x, const T* update, const T* weight, T* sum, T* y, float* rstd,
                                int64_t rows, int64_t width, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    const T* in = x;
    if (update) {
      map<V>(
          width, [](const V& v, const V& u) CALDERA_ALWAYS { return v + u; }, sum, x, update);
      in = sum;
      update += width;
      sum += width;
    }
    V squares = {};
    for_each_vector<V>(
        width, [&](const V& v) CALDERA_ALWAYS { squares += v * v; }, in);
    const float r = 1.0f / std::sqrt(simd::sum(squares) / static_cast<float>(width) + eps);
    rstd[row] = r;
    map<V>(
        width, [r](const V& v, const V& w) CALDERA_ALWAYS { return v * r * w; }, y, in, weight);
  }
}

// With x^ = x * rstd and g = dy * weight: dx = rstd * (g - x^ * mean(g * x^)), dweight = sum over rows of dy
// * x^. `d_residual`, where it is not null, is added to dx.
template <class V, class T>
CALDERA_INLINE void rms_backward(const T* x, const T* weight, const float* rstd, const T* dy,
                                 const T* d_residual, T* dx, float* dweight, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width, dx += width) {
    const float r = rstd[row];
    V products = {};
    if (dweight) {
      for (int64_t i = 0; i < width; i += kLanesOf<V>) {
        const int64_t n = std::min(kLanesOf<V>, width - i);
        const V dy_x = load<V>(dy + i, n) * load<V>(x + i, n);
        products += dy_x * load<V>(weight + i, n);
        store(dweight + i, load<V>(dweight + i, n) + dy_x * r, n);
      }
    } else {
      const auto add = [&](const V& d, const V& v, const V& w) CALDERA_ALWAYS { products += d * v * w; };
      for_each_vector<V>(width, add, dy, x, weight);
    }
    const float shrink = sum(products) * r * r / static_cast<float>(width);
    const auto gradient = [=](const V& d, const V& v, const V& w)
                              CALDERA_ALWAYS { return r * (d * w - v * shrink); };
    if (d_residual) {
      const auto added = [=](const V& d, const V& v, const V& w, const V& past)
                             CALDERA_ALWAYS { return past + gradient(d, v, w); };
      map<V>(width, added, dx, dy, x, weight, d_residual);
      d_residual += width;
    } else {
      map<V>(width, gradient, dx, dy, x, weight);
    }
  }
}

struct Normed {
  at::Tensor y, sum, rstd;  // rstd float32, one a row
};

// All dense, in one dtype; sum is x itself where `update` is not defined.
Normed normed(const at::Tensor& x, const at::Tensor& update, const at::Tensor& weight, double eps) {
  const int64_t width = x.size(-1), rows = width == 0 ? 0 : x.numel() / width;
  // What stays longest comes first: memory is free in larger pieces afterwards.
  const at::Tensor sum = update.defined() ? at::empty_like(x) : at::Tensor(), y = at::empty_like(x),
                   rstd = at::empty({rows}, x.options().dtype(at::kFloat));
  if (x.is_cuda()) {
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::rms_norm_forward(cuda::in<T>(x), cuda::in<T>(update), cuda::in<T>(weight), cuda::out<T>(sum),
                             cuda::out<T>(y), cuda::out<float>(rstd), rows, width, static_cast<float>(eps),
                             stream);
    });
  } else {
    with_cpu_type(x, [&]<class T>(T*) {
      const T *x_data = x.const_data_ptr<T>(), *weight_data = weight.const_data_ptr<T>();
      const T* update_data = update.defined() ? update.const_data_ptr<T>() : nullptr;
      T *y_data = y.mutable_data_ptr<T>(), *sum_data = sum.defined() ? sum.mutable_data_ptr<T>() : nullptr;
      float* rstd_data = rstd.mutable_data_ptr<float>();
      at::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
        const int64_t offset = begin * width;
        simd::run<CALDERA_EACH_WIDTH(rms_forward, T)>(
            x_data + offset, update_data ? update_data + offset : nullptr, weight_data,
            sum_data ? sum_data + offset : nullptr, y_data + offset, rstd_data + begin, end - begin, width,
            static_cast<float>(eps));
      });
    });
  }
  return {y, sum.defined() ? sum : x, rstd};
}

// -> dx. `partial` [parts, width], where it is defined, takes the weight gradients of so many parts of the
// rows.
at::Tensor input_gradient(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd,
                          const at::Tensor& dy, const at::Tensor& d_residual, const at::Tensor& partial) {
  const int64_t width = x.size(-1), rows = rstd.size(0), tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const at::Tensor dx = at::empty_like(x);
  if (x.is_cuda()) {
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::rms_norm_backward(cuda::in<T>(x), cuda::in<T>(weight), cuda::in<float>(rstd), cuda::in<T>(dy),
                              cuda::in<T>(d_residual), cuda::out<T>(dx), cuda::out<float>(partial), rows,
                              width, stream);
    });
    return dx;
  }
  if (partial.defined()) partial.zero_();
  with_cpu_type(x, [&]<class T>(T*) {
    const T *x_data = x.const_data_ptr<T>(), *dy_data = dy.const_data_ptr<T>();
    const T* weight_data = weight.const_data_ptr<T>();
    const T* past_data = d_residual.defined() ? d_residual.const_data_ptr<T>() : nullptr;
    T* dx_data = dx.mutable_data_ptr<T>();
    const float* rstd_data = rstd.const_data_ptr<float>();
    float* partial_data = partial.defined() ? partial.mutable_data_ptr<float>() : nullptr;
    at::parallel_for(0, tasks, row_grain(kRowsPerTask * width), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task * kRowsPerTask, count = std::min(kRowsPerTask, rows - row),
                      offset = row * width;
        simd::run<CALDERA_EACH_WIDTH(rms_backward, T)>(
            x_data + offset, weight_data, rstd_data + row, dy_data + offset,
            past_data ? past_data + offset : nullptr, dx_data + offset,
            partial_data ? partial_data + task * width : nullptr, count, width);
      }
    });
  });
  return dx;
}

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& update, double eps) {
    const Normed made = normed(x, update.value_or(at::Tensor()), weight, eps);
    ctx->save_for_backward({made.sum, weight, made.rstd});
    ctx->saved_data["has_update"] = update.has_value();
    ctx->set_materialize_grads(false);
    return {made.y, made.sum};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    at::Tensor dx = grads[1], dweight;
    if (grads[0].defined()) {
      at::Tensor partial;
      if (ctx->needs_input_grad(1)) {
        const int64_t rows_each = x.is_cuda() ? cuda::kRmsNormRows : kRowsPerTask;
        partial = at::empty({(rstd.size(0) + rows_each - 1) / rows_each, x.size(-1)}, rstd.options());
      }
      const at::Tensor d_residual = grads[1].defined() ? grads[1].contiguous() : at::Tensor();
      dx = input_gradient(x, weight, rstd, grads[0].contiguous(), d_residual, partial);
      if (partial.defined()) dweight = partial.sum(0).to(weight.scalar_type());
    }
    return {dx, dweight, ctx->saved_data["has_update"].toBool() ? dx : at::Tensor(), at::Tensor()};
  }
};

}  // namespace

WithResidual add_rms_norm(const at::Tensor& residual, const at::Tensor& update, const at::Tensor& weight,
                          double eps) {
  CALDERA_PROFILED("rms_norm");
  if (!has_kernel(residual) || weight.scalar_type() != residual.scalar_type()) {
    const at::Tensor sum = update.defined() ? residual + update : residual;
    return {at::rms_norm(sum, weight.sizes(), weight, eps), sum};
  }
  const at::Tensor x = residual.contiguous(), u = update.defined() ? update.contiguous() : update;
  if (!wants_grad(x) && !wants_grad(weight) && !(u.defined() && wants_grad(u))) {
    const Normed made = normed(x.detach(), u.defined() ? u.detach() : u, weight.detach(), eps);
    return {made.y, u.defined() ? made.sum : residual};
  }
  const variable_list made = RmsNormFunction::apply(x, weight, given(u), eps);
  return {made[0], made[1]};
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return add_rms_norm(x, {}, weight, eps).value;
}

}  // namespace caldera
