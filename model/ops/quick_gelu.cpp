#include "model/ops/cuda/launch.h"
#include "model/ops/ops.h"

namespace caldera {
namespace {

struct QuickGeluFunction : torch::autograd::Function<QuickGeluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_in) {
    const at::Tensor x = x_in.contiguous();
    at::Tensor y = at::empty_like(x);
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::quick_gelu_forward(cuda::in<T>(x), cuda::out<T>(y), x.numel(), stream);
    });
    ctx->save_for_backward({x});
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor x = ctx->get_saved_variables()[0], dy = grads[0].contiguous();
    at::Tensor dx = at::empty_like(x);
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::quick_gelu_backward(cuda::in<T>(x), cuda::in<T>(dy), cuda::out<T>(dx), x.numel(), stream);
    });
    return {dx};
  }
};

}  // namespace

at::Tensor quick_gelu(at::Tensor x) {
  CALDERA_PROFILED("quick_gelu");
  if (!has_cuda_kernel(x))
    return x.requires_grad() ? x * at::sigmoid(x * 1.702) : x.mul_((x * 1.702).sigmoid_());
  if (wants_grad(x) || !x.is_contiguous()) return QuickGeluFunction::apply(x);
  cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
    cuda::quick_gelu_forward(cuda::in<T>(x), cuda::out<T>(x), x.numel(), stream);
  });
  return x;
}

}  // namespace caldera
