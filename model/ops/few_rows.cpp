// Linear layers for a few rows at a time, as generation has them: the weights are read once, and reading them
// is all the time there is.
#include <algorithm>
#include <utility>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/matmul.h"
#include "model/ops/simd.h"

// Legend: N rows, I inputs, O outputs.
namespace caldera {
namespace {

using namespace simd;

// Four outputs share the loads of x; each has sums of its own, so that products do not wait for each other.
template <class W>
CALDERA_INLINE void outputs_each(const float* x, const W* weight, const float* scale, const float* bias,
                                 float* y, int64_t num_rows, int64_t num_inputs, int64_t num_outputs,
                                 int64_t begin, int64_t end) {
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
        y[r * num_outputs + o + j] = sums[j] * (scale ? scale[o + j] : 1.0f) + (bias ? bias[o + j] : 0.0f);
    }
  }
}

#define CALDERA_OUTPUTS(W)                                                                          \
  CALDERA_SIMD void outputs(const float* x, const W* weight, const float* scale, const float* bias, \
                            float* y, int64_t num_rows, int64_t num_inputs, int64_t num_outputs,    \
                            int64_t begin, int64_t end) {                                           \
    outputs_each(x, weight, scale, bias, y, num_rows, num_inputs, num_outputs, begin, end);         \
  }
CALDERA_OUTPUTS(float)
CALDERA_OUTPUTS(c10::BFloat16)
CALDERA_OUTPUTS(int8_t)
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

template <class W>
at::Tensor run(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& scale_O,
               const at::Tensor& bias_O) {
  const int64_t N = x_NI.size(0), I = weight_OI.size(1), O = weight_OI.size(0);
  const auto floats = [](const at::Tensor& t) { return t.defined() ? t.to(at::kFloat).contiguous() : t; };
  const at::Tensor x = floats(x_NI), scale = floats(scale_O), bias = floats(bias_O);
  const at::Tensor y = at::empty({N, O}, at::kFloat);
  const auto data = [](const at::Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; };
  const float *x_data = data(x), *scale_data = data(scale), *bias_data = data(bias);
  const W* weight_data = weight_OI.const_data_ptr<W>();
  float* y_data = y.mutable_data_ptr<float>();
  // Fours of outputs: the borders between threads change no bit.
  at::parallel_for(0, (O + 3) / 4, std::max<int64_t>(1, row_grain(I) / 4), [&](int64_t begin, int64_t end) {
    outputs(x_data, weight_data, scale_data, bias_data, y_data, N, I, O, 4 * begin, std::min(O, 4 * end));
  });
  return y.to(x_NI.scalar_type());
}

thread_local bool few_rows = false;

}  // namespace

FewRowsGuard::FewRowsGuard() : before_(std::exchange(few_rows, true)) {}
FewRowsGuard::~FewRowsGuard() { few_rows = before_; }
bool FewRowsGuard::active() { return few_rows && !at::GradMode::is_enabled(); }

at::Tensor affine_few_rows(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& bias_O) {
  CALDERA_ASSERT(weight_OI.is_contiguous() && x_NI.size(1) == weight_OI.size(1));
  return weight_OI.scalar_type() == at::kFloat ? run<float>(x_NI, weight_OI, {}, bias_O)
                                               : run<c10::BFloat16>(x_NI, weight_OI, {}, bias_O);
}

Int8Weight quantize_int8(const at::Tensor& weight_OI) {
  const at::NoGradGuard no_grad;
  const at::Tensor weight = weight_OI.detach().to(at::kFloat);
  const at::Tensor scale_O = weight.abs().amax(1).clamp_min(1e-12) / 127;
  return {(weight / scale_O.unsqueeze(1)).round().to(at::kChar).contiguous(), scale_O};
}

at::Tensor affine_int8(const at::Tensor& x_NI, const Int8Weight& weight, const at::Tensor& bias_O) {
  CALDERA_ASSERT(!wants_grad(x_NI) && x_NI.dim() == 2 && x_NI.size(1) == weight.values_OI.size(1));
  if (x_NI.size(0) <= 4) return run<int8_t>(x_NI, weight.values_OI, weight.scale_O, bias_O);
  return affine(x_NI, restored(weight, x_NI.scalar_type()), bias_O);
}

}  // namespace caldera
