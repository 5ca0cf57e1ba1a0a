#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/ops.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

template <class V, class T>
CALDERA_INLINE void swiglu_forward(const T* gate_up, T* y, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, gate_up += 2 * width, y += width) {
    map<V>(
        width, [](const V& gate, const V& up) CALDERA_ALWAYS { return gate * sigmoid(gate) * up; }, y,
        gate_up, gate_up + width);
  }
}

// d silu(g) = s + g * s * (1 - s), s = sigmoid(g).
template <class V, class T>
CALDERA_INLINE void swiglu_backward(const T* gate_up, const T* dy, T* d_gate_up, int64_t rows,
                                    int64_t width) {
  for (int64_t row = 0; row < rows; ++row, gate_up += 2 * width, d_gate_up += 2 * width, dy += width) {
    const T *up = gate_up + width, *gate = gate_up;
    T *d_gate = d_gate_up, *d_up = d_gate_up + width;
    struct Gradients {
      V gate, up;
    };
    const auto gradients = [](const V& g, const V& u, const V& d) CALDERA_ALWAYS {
      const V s = sigmoid(g), silu = g * s;
      return Gradients{d * u * (s + silu * (1.0f - s)), d * silu};
    };
    int64_t i = 0;
    for (; i + 2 * kLanesOf<V> <= width; i += 2 * kLanesOf<V>) {
      const Two<V> g = load_two<V>(gate + i), u = load_two<V>(up + i), d = load_two<V>(dy + i);
      const Gradients a = gradients(g.first, u.first, d.first), b = gradients(g.second, u.second, d.second);
      store_two(d_gate + i, Two<V>{a.gate, b.gate});
      store_two(d_up + i, Two<V>{a.up, b.up});
    }
    for (; i < width; i += kLanesOf<V>) {
      const int64_t n = std::min(kLanesOf<V>, width - i);
      const Gradients a = gradients(load<V>(gate + i, n), load<V>(up + i, n), load<V>(dy + i, n));
      store(d_gate + i, a.gate, n);
      store(d_up + i, a.up, n);
    }
  }
}

at::Tensor swiglu_of(const at::Tensor& gate_up) {
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  at::Tensor y = at::empty({rows, width}, gate_up.options());
  if (y.is_cuda()) {
    cuda::with_type(y, [&]<class T>(T*, cuda::Stream stream) {
      cuda::swiglu_forward(cuda::in<T>(gate_up), cuda::out<T>(y), rows, width, stream);
    });
  } else {
    with_cpu_type(y, [&]<class T>(T*) {
      const T* x_data = gate_up.const_data_ptr<T>();
      T* y_data = y.mutable_data_ptr<T>();
      at::parallel_for(0, rows, row_grain(2 * width), [&](int64_t begin, int64_t end) {
        simd::run<CALDERA_EACH_WIDTH(swiglu_forward, T)>(x_data + begin * 2 * width, y_data + begin * width,
                                                         end - begin, width);
      });
    });
  }
  return y;
}

struct SwigluFunction : torch::autograd::Function<SwigluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_up_in) {
    const at::Tensor gate_up = gate_up_in.contiguous();
    ctx->save_for_backward({gate_up});
    return swiglu_of(gate_up);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const at::Tensor gate_up = ctx->get_saved_variables()[0], dy = grads[0].contiguous();
    const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
    at::Tensor d_gate_up = at::empty_like(gate_up);
    if (dy.is_cuda()) {
      cuda::with_type(dy, [&]<class T>(T*, cuda::Stream stream) {
        cuda::swiglu_backward(cuda::in<T>(gate_up), cuda::in<T>(dy), cuda::out<T>(d_gate_up), rows, width,
                              stream);
      });
    } else {
      with_cpu_type(dy, [&]<class T>(T*) {
        const T *x_data = gate_up.const_data_ptr<T>(), *dy_data = dy.const_data_ptr<T>();
        T* dx_data = d_gate_up.mutable_data_ptr<T>();
        at::parallel_for(0, rows, row_grain(2 * width), [&](int64_t begin, int64_t end) {
          simd::run<CALDERA_EACH_WIDTH(swiglu_backward, T)>(x_data + begin * 2 * width,
                                                            dy_data + begin * width,
                                                            dx_data + begin * 2 * width, end - begin, width);
        });
      });
    }
    return {d_gate_up};
  }
};

}  // namespace

at::Tensor swiglu(const at::Tensor& gate_up) {
  CALDERA_ASSERT(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0);
  CALDERA_PROFILED("swiglu");
  if (has_kernel(gate_up))
    return wants_grad(gate_up) ? SwigluFunction::apply(gate_up) : swiglu_of(gate_up.contiguous());
  const std::vector<at::Tensor> halves = gate_up.chunk(2, -1);
  return at::silu(halves[0]) * halves[1];
}

}  // namespace caldera
