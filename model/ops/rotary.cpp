#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/ops.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

// y = x * cos + sign * rotate_half(x) * sin; the transpose (sign -1) is the gradient, for both halves of a
// table's row are equal. Tables [T, K]; x rows `x_stride` apart, y rows `y_stride`.
template <class V, class T>
CALDERA_INLINE void rotate_rows(const T* x, int64_t x_stride, const float* cos, const float* sin, float sign,
                                T* y, int64_t y_stride, int64_t rows, int64_t heads, int64_t width) {
  const int64_t half = width / 2;
  for (int64_t row = 0; row < rows; ++row, x += x_stride, y += y_stride, cos += width, sin += width) {
    for (int64_t head = 0; head < heads; ++head) {
      const T* x_head = x + head * width;
      T* y_head = y + head * width;
      for (int64_t i = 0; i < half; i += kLanesOf<V>) {
        const int64_t n = std::min(kLanesOf<V>, half - i);
        const V low = load<V>(x_head + i, n), high = load<V>(x_head + half + i, n);
        const V c = load<V>(cos + i, n), s = sign * load<V>(sin + i, n);
        store(y_head + i, low * c - high * s, n);
        store(y_head + half + i, high * c + low * s, n);
      }
    }
  }
}

// Heads are dense within a row, of which a slice may be meant: it is read or written in place.
bool has_dense_heads(const at::Tensor& x) { return x.stride(2) == 1 && x.stride(1) == x.size(2); }

void rotate_into(const at::Tensor& x_in, const at::Tensor& cos, const at::Tensor& sin, float sign,
                 const at::Tensor& y) {
  const int64_t rows = x_in.size(0), heads = x_in.size(1), width = x_in.size(2);
  const at::Tensor x = has_dense_heads(x_in) ? x_in : x_in.contiguous();
  CALDERA_ASSERT(has_dense_heads(y) && y.sizes() == x.sizes());
  const int64_t x_stride = x.stride(0), y_stride = y.stride(0);
  if (x.is_cuda()) {
    cuda::with_type(x, [&]<class T>(T*, cuda::Stream stream) {
      cuda::rotate(cuda::in<T>(x), x_stride, cuda::in<float>(cos), cuda::in<float>(sin), sign,
                   cuda::out<T>(y), y_stride, rows, heads, width, stream);
    });
    return;
  }
  with_cpu_type(x, [&]<class T>(T*) {
    const T* x_data = x.const_data_ptr<T>();
    T* y_data = y.mutable_data_ptr<T>();
    const float *cos_data = cos.const_data_ptr<float>(), *sin_data = sin.const_data_ptr<float>();
    at::parallel_for(0, rows, row_grain(heads * width), [&](int64_t begin, int64_t end) {
      simd::run<CALDERA_EACH_WIDTH(rotate_rows, T)>(
          x_data + begin * x_stride, x_stride, cos_data + begin * width, sin_data + begin * width, sign,
          y_data + begin * y_stride, y_stride, end - begin, heads, width);
    });
  });
}

at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, float sign) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  rotate_into(x, cos, sin, sign, y);
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

// The heads of a row [T, (H + 2G) K], as views.
struct Heads {
  at::Tensor q_and_k, q, k, v;
};
Heads heads_of(const at::Tensor& qkv, int64_t num_heads, int64_t num_kv_heads) {
  const int64_t count = num_heads + 2 * num_kv_heads;
  const at::Tensor all = qkv.view({qkv.size(0), count, qkv.size(1) / count});
  return {all.narrow(1, 0, num_heads + num_kv_heads), all.narrow(1, 0, num_heads),
          all.narrow(1, num_heads, num_kv_heads), all.narrow(1, num_heads + num_kv_heads, num_kv_heads)};
}

struct SplitRotaryFunction : torch::autograd::Function<SplitRotaryFunction> {
  static variable_list forward(AutogradContext* ctx, const at::Tensor& qkv, int64_t num_heads,
                               int64_t num_kv_heads, const at::Tensor& cos, const at::Tensor& sin) {
    ctx->save_for_backward({cos, sin});
    ctx->saved_data["num_heads"] = num_heads;
    ctx->saved_data["num_kv_heads"] = num_kv_heads;
    const Heads heads = heads_of(qkv, num_heads, num_kv_heads);
    const at::Tensor turned = rotated(heads.q_and_k, cos, sin, 1);
    // v in memory of its own: a view would keep the whole projection, of which backward wants nothing else.
    return {turned.narrow(1, 0, num_heads), turned.narrow(1, num_heads, num_kv_heads), heads.v.contiguous()};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t H = ctx->saved_data["num_heads"].toInt(), G = ctx->saved_data["num_kv_heads"].toInt();
    const at::Tensor &dq = grads[0], &dk = grads[1], &dv = grads[2];
    at::Tensor d_qkv = at::empty({dq.size(0), (H + 2 * G) * dq.size(2)}, dq.options());
    const Heads heads = heads_of(d_qkv, H, G);
    rotate_into(dq, saved[0], saved[1], -1, heads.q);
    rotate_into(dk, saved[0], saved[1], -1, heads.k);
    heads.v.copy_(dv);
    return {d_qkv, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

Rotary rotary_tables(const at::Tensor& inv_freq, const at::Tensor& positions_T, double scaling,
                     at::ScalarType dtype) {
  // MKL, by which ATen computes these, picks its code at the first call. Where several threads make that call
  // at once, one of them now and then takes other code, and its angles other last bits: here one thread makes
  // it.
  [[maybe_unused]] static const std::array first_calls = {at::zeros({1}).cos(), at::zeros({1}).sin()};
  const at::Tensor half = at::outer(positions_T.to(at::kFloat), inv_freq);
  const at::Tensor angles = at::cat({half, half}, -1);
  return {(angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)};
}

at::Tensor apply_rotary(const at::Tensor& x_THK, const Rotary& rotary) {
  CALDERA_PROFILED("apply_rotary");
  const int64_t width = x_THK.size(2);
  CALDERA_ASSERT(width % 2 == 0 && rotary.cos_TK.size(0) == x_THK.size(0) && rotary.cos_TK.size(1) == width);
  if (has_kernel(x_THK) && rotary.cos_TK.scalar_type() == at::kFloat) {
    if (!wants_grad(x_THK)) return rotated(x_THK, rotary.cos_TK, rotary.sin_TK, 1);
    return RotaryFunction::apply(x_THK, rotary.cos_TK, rotary.sin_TK);
  }
  const at::Tensor low = x_THK.narrow(2, 0, width / 2), high = x_THK.narrow(2, width / 2, width / 2);
  const at::Tensor turned = at::cat({-high, low}, -1);
  return (x_THK * rotary.cos_TK.unsqueeze(1) + turned * rotary.sin_TK.unsqueeze(1)).to(x_THK.scalar_type());
}

std::array<at::Tensor, 3> split_rotary(const at::Tensor& qkv, int64_t num_heads, int64_t num_kv_heads,
                                       const Rotary& rotary) {
  CALDERA_PROFILED("split_rotary");
  if (wants_grad(qkv) && has_kernel(qkv) && qkv.is_contiguous() &&
      rotary.cos_TK.scalar_type() == at::kFloat) {
    const variable_list parts =
        SplitRotaryFunction::apply(qkv, num_heads, num_kv_heads, rotary.cos_TK, rotary.sin_TK);
    return {parts[0], parts[1], parts[2]};
  }
  const Heads heads = heads_of(qkv, num_heads, num_kv_heads);
  const at::Tensor turned = apply_rotary(heads.q_and_k, rotary);
  return {turned.narrow(1, 0, num_heads), turned.narrow(1, num_heads, num_kv_heads), heads.v};
}

}  // namespace caldera
