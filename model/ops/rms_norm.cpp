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

template <class T>
CALDERA_INLINE void forward_rows(const T* x, const T* weight, T* y, float* rstd, int64_t rows, int64_t width,
                                 float eps) {
  for (int64_t row = 0; row < rows; ++row, x += width, y += width) {
    Vec squares = {};
    for_each_vector(width, [&](const Vec& v) CALDERA_ALWAYS { squares += v * v; }, x);
    const float r = 1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps);
    rstd[row] = r;
    map(width, [r](const Vec& v, const Vec& w) CALDERA_ALWAYS { return v * r * w; }, y, x, weight);
  }
}

// With x^ = x * rstd and g = dy * weight: dx = rstd * (g - x^ * mean(g * x^)), dweight = sum over rows of dy
// * x^.
template <class T>
CALDERA_INLINE void backward_rows(const T* x, const T* weight, const float* rstd, const T* dy, T* dx,
                                  float* dweight, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x += width, dy += width, dx += width) {
    const float r = rstd[row];
    Vec products = {};
    if (dweight) {
      for (int64_t i = 0; i < width; i += kLanes) {
        const int64_t n = std::min(kLanes, width - i);
        const Vec dy_x = load(dy + i, n) * load(x + i, n);
        products += dy_x * load(weight + i, n);
        store(dweight + i, load(dweight + i, n) + dy_x * r, n);
      }
    } else {
      const auto add = [&](const Vec& d, const Vec& v, const Vec& w) CALDERA_ALWAYS { products += d * v * w; };
      for_each_vector(width, add, dy, x, weight);
    }
    const float shrink = sum(products) * r * r / static_cast<float>(width);
    const auto gradient = [=](const Vec& d, const Vec& v, const Vec& w) CALDERA_ALWAYS {
      return r * (d * w - v * shrink);
    };
    map(width, gradient, dx, dy, x, weight);
  }
}

CALDERA_SIMD void rms_forward(const float* x, const float* weight, float* y, float* rstd, int64_t rows,
                              int64_t width, float eps) {
  forward_rows(x, weight, y, rstd, rows, width, eps);
}
CALDERA_SIMD void rms_forward(const c10::BFloat16* x, const c10::BFloat16* weight, c10::BFloat16* y,
                              float* rstd, int64_t rows, int64_t width, float eps) {
  forward_rows(x, weight, y, rstd, rows, width, eps);
}
CALDERA_SIMD void rms_backward(const float* x, const float* weight, const float* rstd, const float* dy,
                               float* dx, float* dweight, int64_t rows, int64_t width) {
  backward_rows(x, weight, rstd, dy, dx, dweight, rows, width);
}
CALDERA_SIMD void rms_backward(const c10::BFloat16* x, const c10::BFloat16* weight, const float* rstd,
                               const c10::BFloat16* dy, c10::BFloat16* dx, float* dweight, int64_t rows,
                               int64_t width) {
  backward_rows(x, weight, rstd, dy, dx, dweight, rows, width);
}

struct RmsNormFunction : torch::autograd::Function<RmsNormFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_in, const at::Tensor& weight,
                            double eps) {
    const at::Tensor x = x_in.contiguous();
    const int64_t width = x.size(-1), rows = width == 0 ? 0 : x.numel() / width;
    at::Tensor y = at::empty_like(x), rstd = at::empty({rows}, x.options().dtype(at::kFloat));
    if (x.is_cuda()) {
      cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
        cuda::rms_norm_forward(cuda::in<T>(x), cuda::in<T>(weight), cuda::out<T>(y), cuda::out<float>(rstd), rows,
                               width, static_cast<float>(eps), stream);
      });
    } else {
      with_cpu_type(x, [&]<class T>(T*) {
        const T* x_data = x.const_data_ptr<T>();
        const T* weight_data = weight.const_data_ptr<T>();
        T* y_data = y.mutable_data_ptr<T>();
        float* rstd_data = rstd.mutable_data_ptr<float>();
        at::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
          rms_forward(x_data + begin * width, weight_data, y_data + begin * width, rstd_data + begin,
                      end - begin, width, static_cast<float>(eps));
        });
      });
    }
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2], dy = grads[0].contiguous();
    at::Tensor dx = at::empty_like(x), partial;
    if (ctx->needs_input_grad(1)) {
      const int64_t rows_each = x.is_cuda() ? cuda::kRmsNormRows : kRowsPerTask;
      partial = at::empty({(rstd.size(0) + rows_each - 1) / rows_each, x.size(-1)}, rstd.options());
    }
    if (x.is_cuda())
      backward_on_cuda(x, weight, rstd, dy, dx, partial);
    else
      backward_on_cpu(x, weight, rstd, dy, dx, partial);
    return {dx, partial.defined() ? partial.sum(0).to(weight.scalar_type()) : at::Tensor(), at::Tensor()};
  }

  // `partial` [parts, width], where it is defined, takes the weight gradients of so many parts of the rows.
  static void backward_on_cuda(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd,
                               const at::Tensor& dy, const at::Tensor& dx, const at::Tensor& partial) {
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::rms_norm_backward(cuda::in<T>(x), cuda::in<T>(weight), cuda::in<float>(rstd), cuda::in<T>(dy),
                              cuda::out<T>(dx), cuda::out<float>(partial), rstd.size(0), x.size(-1), stream);
    });
  }

  static void backward_on_cpu(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd,
                              const at::Tensor& dy, const at::Tensor& dx, const at::Tensor& partial) {
    const int64_t width = x.size(-1), rows = rstd.size(0), tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    if (partial.defined()) partial.zero_();
    with_cpu_type(x, [&]<class T>(T*) {
      const T *x_data = x.const_data_ptr<T>(), *dy_data = dy.const_data_ptr<T>();
      const T* weight_data = weight.const_data_ptr<T>();
      T* dx_data = dx.mutable_data_ptr<T>();
      const float* rstd_data = rstd.const_data_ptr<float>();
      float* partial_data = partial.defined() ? partial.mutable_data_ptr<float>() : nullptr;
      at::parallel_for(0, tasks, row_grain(kRowsPerTask * width), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task * kRowsPerTask, count = std::min(kRowsPerTask, rows - row),
                        offset = row * width;
          rms_backward(x_data + offset, weight_data, rstd_data + row, dy_data + offset, dx_data + offset,
                       partial_data ? partial_data + task * width : nullptr, count, width);
        }
      });
    });
  }
};

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  CALDERA_PROFILED("rms_norm");
  if (has_kernel(x) && weight.scalar_type() == x.scalar_type())
    return RmsNormFunction::apply(x, weight, eps);
  return at::rms_norm(x, weight.sizes(), weight, eps);
}

}  // namespace caldera
