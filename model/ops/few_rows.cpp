// Linear layers for a few rows at a time, as generation has them: the weights are read once, and reading them
// is all the time there is.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/few_rows_avx512.h"
#include "model/ops/matmul.h"
#include "model/ops/simd.h"

// Legend: N rows, I inputs, O outputs.
namespace caldera {
namespace {

using namespace simd;

// What every kernel below works on: rows x [N, I] and weights [O, I] -> y [N, O], of which [begin, end) of
// the outputs. Four of them share the loads of x; each has sums of its own, so that products do not wait for
// each other. T is the type of bias and y; x is in float32.
template <class W, class T>
CALDERA_INLINE void outputs_each(const float* x, const W* weight, const float* scale, const T* bias, T* y,
                                 int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t begin,
                                 int64_t end) {
  const int64_t whole = num_inputs / kLanes * kLanes, rest = num_inputs - whole;
  for (int64_t o = begin; o < end; o += 4) {
    const int64_t count = std::min<int64_t>(4, end - o);
    const W* w[4];
    for (int64_t j = 0; j < 4; ++j) w[j] = weight + (o + std::min(j, count - 1)) * num_inputs;
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* row = x + r * num_inputs;
      Vec s0 = {}, s1 = {}, s2 = {}, s3 = {};
      for (int64_t i = 0; i < whole; i += kLanes) {
        const Vec v = load(row + i);
        s0 += v * load(w[0] + i);
        s1 += v * load(w[1] + i);
        s2 += v * load(w[2] + i);
        s3 += v * load(w[3] + i);
      }
      if (rest > 0) {
        const Vec v = load(row + whole, rest);
        s0 += v * load(w[0] + whole, rest);
        s1 += v * load(w[1] + whole, rest);
        s2 += v * load(w[2] + whole, rest);
        s3 += v * load(w[3] + whole, rest);
      }
      const float sums[4] = {sum(s0), sum(s1), sum(s2), sum(s3)};
      for (int64_t j = 0; j < count; ++j)
        y[r * num_outputs + o + j] = static_cast<T>(sums[j] * (scale ? scale[o + j] : 1.0f) +
                                                    (bias ? static_cast<float>(bias[o + j]) : 0.0f));
    }
  }
}

#define CALDERA_OUTPUTS(W, T)                                                                         \
  CALDERA_SIMD void outputs(const float* x, const W* weight, const float* scale, const T* bias, T* y, \
                            int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t begin, \
                            int64_t end) {                                                            \
    outputs_each(x, weight, scale, bias, y, num_rows, num_inputs, num_outputs, begin, end);           \
  }
CALDERA_OUTPUTS(float, float)
CALDERA_OUTPUTS(c10::BFloat16, c10::BFloat16)
CALDERA_OUTPUTS(int8_t, float)
CALDERA_OUTPUTS(int8_t, c10::BFloat16)
#undef CALDERA_OUTPUTS

template <class T>
CALDERA_INLINE void restore_each(const int8_t* values, const float* scale, T* out, int64_t num_rows,
                                 int64_t width) {
  for (int64_t r = 0; r < num_rows; ++r, values += width, out += width) {
    for (int64_t i = 0; i < width; i += kLanes) {
      const int64_t n = std::min(kLanes, width - i);
      store(out + i, load(values + i, n) * scale[r], n);
    }
  }
}
CALDERA_SIMD void restore(const int8_t* values, const float* scale, float* out, int64_t num_rows,
                          int64_t width) {
  restore_each(values, scale, out, num_rows, width);
}
CALDERA_SIMD void restore(const int8_t* values, const float* scale, c10::BFloat16* out, int64_t num_rows,
                          int64_t width) {
  restore_each(values, scale, out, num_rows, width);
}

// The weight in float32 or bfloat16 again.
at::Tensor restored(const Int8Weight& weight, at::ScalarType dtype) {
  const int64_t O = weight.values_OI.size(0), I = weight.values_OI.size(1);
  const at::Tensor out = at::empty({O, I}, dtype);
  const int8_t* values = weight.values_OI.const_data_ptr<int8_t>();
  const float* scale = weight.scale_O.const_data_ptr<float>();
  with_cpu_type(out, [&]<class T>(T*) {
    T* data = out.mutable_data_ptr<T>();
    at::parallel_for(0, O, row_grain(I), [&](int64_t begin, int64_t end) {
      restore(values + begin * I, scale + begin, data + begin * I, end - begin, I);
    });
  });
  return out;
}

CALDERA_SIMD void widen(const c10::BFloat16* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = std::min(kLanes, count - i);
    store(out + i, load(x + i, n), n);
  }
}

// Calls work(begin, end) for parts of O outputs, each begun at a multiple of four: the borders between
// threads change no bit.
template <class Work>
void for_outputs(int64_t O, int64_t I, const Work& work) {
  at::parallel_for(0, (O + 3) / 4, std::max<int64_t>(1, row_grain(I) / 4),
                   [&](int64_t begin, int64_t end) { work(4 * begin, std::min(O, 4 * end)); });
}

// The rows in float32.
class Floats {
 public:
  Floats(const float* x, int64_t) : data_(x) {}
  Floats(const c10::BFloat16* x, int64_t count)
      : widened_(static_cast<size_t>(count)), data_(widened_.data()) {
    widen(x, widened_.data(), count);
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> widened_;
  const float* data_;
};

// x [N, I] and y [N, O] are of type T, as are the bias where there is one, and the weights.
template <class T>
void run(const T* x, const T* weight, const T* bias, T* y, int64_t N, int64_t I, int64_t O) {
#ifdef CALDERA_NARROW_PRODUCTS
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (has_bf16_products()) {
      for_outputs(O, I,
                  [&](int64_t begin, int64_t end) { bf16_outputs(x, weight, bias, y, N, I, O, begin, end); });
      return;
    }
  }
#endif
  const Floats floats(x, N * I);
  for_outputs(O, I, [&](int64_t begin, int64_t end) {
    outputs(floats.data(), weight, nullptr, bias, y, N, I, O, begin, end);
  });
}

template <class T>
void run_int8(const T* x, const Int8Weight& weight, const T* bias, T* y, int64_t N, int64_t I, int64_t O) {
  const int8_t* values = weight.values_OI.const_data_ptr<int8_t>();
  const float* scale = weight.scale_O.const_data_ptr<float>();
  const Floats floats(x, N * I);
#ifdef CALDERA_NARROW_PRODUCTS
  if (has_int8_products() && I <= 65536) {
    const SplitRows rows = split_rows(floats.data(), N, I);
    std::vector<int64_t> sums(static_cast<size_t>(N * O));
    for_outputs(O, I, [&](int64_t begin, int64_t end) {
      int8_sums(rows, values, weight.sum_O.const_data_ptr<int32_t>(), sums.data(), N, I, O, begin, end);
      for (int64_t r = 0; r < N; ++r)
        for (int64_t o = begin; o < end; ++o)
          y[r * O + o] = static_cast<T>(static_cast<float>(sums[static_cast<size_t>(r * O + o)]) *
                                            rows.scale[static_cast<size_t>(r)] * scale[o] +
                                        (bias ? static_cast<float>(bias[o]) : 0.0f));
    });
    return;
  }
#endif
  for_outputs(O, I, [&](int64_t begin, int64_t end) {
    outputs(floats.data(), values, scale, bias, y, N, I, O, begin, end);
  });
}

// Calls f(x, bias, y) with the data of contiguous tensors; returns y [N, O].
template <class Function>
at::Tensor with_data(const at::Tensor& x_NI, const at::Tensor& bias_O, int64_t num_outputs, Function f) {
  const at::Tensor x = x_NI.contiguous(), y = at::empty({x.size(0), num_outputs}, x.options());
  CALDERA_ASSERT(!bias_O.defined() || (bias_O.scalar_type() == x.scalar_type() && bias_O.is_contiguous()));
  with_cpu_type(x, [&]<class T>(T*) {
    f(x.const_data_ptr<T>(), bias_O.defined() ? bias_O.const_data_ptr<T>() : nullptr,
      y.mutable_data_ptr<T>());
  });
  return y;
}

thread_local bool few_rows = false;

}  // namespace

FewRowsGuard::FewRowsGuard() : before_(std::exchange(few_rows, true)) {}
FewRowsGuard::~FewRowsGuard() { few_rows = before_; }
bool FewRowsGuard::active() { return few_rows && !at::GradMode::is_enabled(); }

at::Tensor affine_few_rows(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& bias_O) {
  const int64_t N = x_NI.size(0), I = weight_OI.size(1), O = weight_OI.size(0);
  CALDERA_ASSERT(weight_OI.is_contiguous() && x_NI.size(1) == I &&
                 weight_OI.scalar_type() == x_NI.scalar_type());
  return with_data(x_NI, bias_O, O, [&]<class T>(const T* x, const T* bias, T* y) {
    run(x, weight_OI.const_data_ptr<T>(), bias, y, N, I, O);
  });
}

Int8Weight quantize_int8(const at::Tensor& weight_OI) {
  const at::NoGradGuard no_grad;
  const at::Tensor weight = weight_OI.detach().to(at::kFloat);
  const at::Tensor scale_O = weight.abs().amax(1).clamp_min(1e-12) / 127;
  const at::Tensor values_OI = (weight / scale_O.unsqueeze(1)).round().to(at::kChar).contiguous();
  return {values_OI, scale_O, values_OI.sum(1, /*keepdim=*/false, at::kInt)};
}

at::Tensor affine_int8(const at::Tensor& x_NI, const Int8Weight& weight, const at::Tensor& bias_O) {
  CALDERA_ASSERT(!wants_grad(x_NI) && x_NI.dim() == 2 && x_NI.size(1) == weight.values_OI.size(1));
  const int64_t N = x_NI.size(0), I = x_NI.size(1), O = weight.values_OI.size(0);
  if (N <= 4) {
    return with_data(x_NI, bias_O, O, [&]<class T>(const T* x, const T* bias, T* y) {
      run_int8(x, weight, bias, y, N, I, O);
    });
  }
  return affine(x_NI, restored(weight, x_NI.scalar_type()), bias_O);
}

}  // namespace caldera
