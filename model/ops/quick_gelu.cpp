#include "model/ops/cuda/launch.h"
#include "model/ops/ops.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

template <class V, class T>
CALDERA_INLINE void gelu_forward(const T* x, T* y, int64_t count) {
  map<V>(
      count, [](const V& v) CALDERA_ALWAYS { return v * sigmoid(1.702f * v); }, y, x);
}
// d (x s) = s + 1.702 x s (1 - s), s = sigmoid(1.702 x).
template <class V, class T>
CALDERA_INLINE void gelu_backward(const T* x, const T* dy, T* dx, int64_t count) {
  const auto gradient = [](const V& v, const V& d) CALDERA_ALWAYS {
    const V s = sigmoid(1.702f * v);
    return d * (s + 1.702f * v * s * (1.0f - s));
  };
  map<V>(count, gradient, dx, x, dy);
}

// y may be x itself. Both dense.
void forward_into(const at::Tensor& x, const at::Tensor& y) {
  if (x.is_cuda()) {
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::quick_gelu_forward(cuda::in<T>(x), cuda::out<T>(y), x.numel(), stream);
    });
    return;
  }
  with_cpu_type(x, [&]<class T>(T*) {
    const T* x_data = x.const_data_ptr<T>();
    T* y_data = y.mutable_data_ptr<T>();
    at::parallel_for(0, x.numel(), row_grain(1), [&](int64_t begin, int64_t end) {
      simd::run<CALDERA_EACH_WIDTH(gelu_forward, T)>(x_data + begin, y_data + begin, end - begin);
    });
  });
}

struct QuickGeluFunction : torch::autograd::Function<QuickGeluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_in) {
    const at::Tensor x = x_in.contiguous();
    at::Tensor y = at::empty_like(x);
    forward_into(x, y);
    ctx->save_for_backward({x});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor x = ctx->get_saved_variables()[0], dy = grads[0].contiguous();
    at::Tensor dx = at::empty_like(x);
    if (x.is_cuda()) {
      cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
        cuda::quick_gelu_backward(cuda::in<T>(x), cuda::in<T>(dy), cuda::out<T>(dx), x.numel(), stream);
      });
      return {dx};
    }
    with_cpu_type(x, [&]<class T>(T*) {
      const T *x_data = x.const_data_ptr<T>(), *dy_data = dy.const_data_ptr<T>();
      T* dx_data = dx.mutable_data_ptr<T>();
      at::parallel_for(0, x.numel(), row_grain(1), [&](int64_t begin, int64_t end) {
        simd::run<CALDERA_EACH_WIDTH(gelu_backward, T)>(x_data + begin, dy_data + begin, dx_data + begin,
                                                        end - begin);
      });
    });
    return {dx};
  }
};

}  // namespace

at::Tensor quick_gelu(at::Tensor x) {
  CALDERA_PROFILED("quick_gelu");
  if (!has_kernel(x)) return x * at::sigmoid(x * 1.702);
  if (x.requires_grad() || !x.is_contiguous()) return QuickGeluFunction::apply(x);
  forward_into(x, x);
  return x;
}

}  // namespace caldera
