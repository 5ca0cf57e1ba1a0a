#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/ops.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

// y = x * cos + sign * rotate_half(x) * sin; the transpose (sign -1) is the gradient, for both halves of a
// table's row are equal. Tables [T, K]; x rows `x_stride` apart, y dense.
template <class T>
CALDERA_INLINE void rotate_rows(const T* x, int64_t x_stride, const float* cos, const float* sin, float sign,
                                T* y, int64_t rows, int64_t heads, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t row = 0; row < rows; ++row, x += x_stride, y += heads * width, cos += width, sin += width) {
    for (int64_t head = 0; head < heads; ++head) {
      const T* x_head = x + head * width;
      T* y_head = y + head * width;
      for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t n = std::min(kLanes, half - i);
        const Vec low = load(x_head + i, n), high = load(x_head + half + i, n);
        const Vec c = load(cos + i, n), s = sign * load(sin + i, n);
        store(y_head + i, low * c - high * s, n);
        store(y_head + half + i, high * c + low * s, n);
      }
    }
  }
}

CALDERA_SIMD void rotate(const float* x, int64_t x_stride, const float* cos, const float* sin, float sign,
                         float* y, int64_t rows, int64_t heads, int64_t width) {
  rotate_rows(x, x_stride, cos, sin, sign, y, rows, heads, width);
}
CALDERA_SIMD void rotate(const c10::BFloat16* x, int64_t x_stride, const float* cos, const float* sin,
                         float sign, c10::BFloat16* y, int64_t rows, int64_t heads, int64_t width) {
  rotate_rows(x, x_stride, cos, sin, sign, y, rows, heads, width);
}

at::Tensor rotated(const at::Tensor& x_in, const at::Tensor& cos, const at::Tensor& sin, float sign) {
  const int64_t rows = x_in.size(0), heads = x_in.size(1), width = x_in.size(2);
  // A slice of a fused projection has dense heads but rows farther apart: read in place.
  const bool dense_heads = x_in.stride(2) == 1 && x_in.stride(1) == width;
  const at::Tensor x = dense_heads ? x_in : x_in.contiguous();
  at::Tensor y = at::empty({rows, heads, width}, x.options());
  if (x.is_cuda()) {
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::rotate(cuda::in<T>(x), x.stride(0), cuda::in<float>(cos), cuda::in<float>(sin), sign, cuda::out<T>(y),
                   rows, heads, width, stream);
    });
    return y;
  }
  with_cpu_type(x, [&]<class T>(T*) {
    const T* x_data = x.const_data_ptr<T>();
    T* y_data = y.mutable_data_ptr<T>();
    const float *cos_data = cos.const_data_ptr<float>(), *sin_data = sin.const_data_ptr<float>();
    at::parallel_for(0, rows, row_grain(heads * width), [&](int64_t begin, int64_t end) {
      rotate(x_data + begin * x.stride(0), x.stride(0), cos_data + begin * width, sin_data + begin * width,
             sign, y_data + begin * heads * width, end - begin, heads, width);
    });
  });
  return y;
}

struct RotaryFunction : torch::autograd::Function<RotaryFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    return rotated(x, cos, sin, 1);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    return {rotated(grads[0], saved[0], saved[1], -1), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

Rotary rotary_tables(const at::Tensor& inv_freq, const at::Tensor& positions_T, double scaling,
                     at::ScalarType dtype) {
  const at::Tensor half = at::outer(positions_T.to(at::kFloat), inv_freq);
  const at::Tensor angles = at::cat({half, half}, -1);
  return {(angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)};
}

at::Tensor apply_rotary(const at::Tensor& x_THK, const Rotary& rotary) {
  CALDERA_PROFILED("apply_rotary");
  const int64_t width = x_THK.size(2);
  CALDERA_ASSERT(width % 2 == 0 && rotary.cos_TK.size(0) == x_THK.size(0) && rotary.cos_TK.size(1) == width);
  if (has_kernel(x_THK) && rotary.cos_TK.scalar_type() == at::kFloat)
    return RotaryFunction::apply(x_THK, rotary.cos_TK, rotary.sin_TK);
  const at::Tensor low = x_THK.narrow(2, 0, width / 2), high = x_THK.narrow(2, width / 2, width / 2);
  const at::Tensor turned = at::cat({-high, low}, -1);
  return (x_THK * rotary.cos_TK.unsqueeze(1) + turned * rotary.sin_TK.unsqueeze(1)).to(x_THK.scalar_type());
}

}  // namespace caldera
