// Linear layers for a few rows at a time, as generation has them: the weights are read once, and reading them
// is all the time there is.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/few_rows_avx2.h"
#include "model/ops/few_rows_avx512.h"
#include "model/ops/matmul.h"
#include "model/ops/simd.h"

// Legend: N rows, I inputs, O outputs.
namespace caldera {
namespace {

using namespace simd;

// sums [N, O] = x [N, I] weights [O, I]^T, of which the outputs [begin, end). Four of them share the loads of
// x; each has sums of its own, so that products do not wait for each other.
template <class V, class W>
CALDERA_INLINE void sums_of(const float* x, const W* weight, float* sums, int64_t num_rows,
                            int64_t num_inputs, int64_t num_outputs, int64_t begin, int64_t end) {
  const int64_t whole = num_inputs / kLanesOf<V> * kLanesOf<V>, rest = num_inputs - whole;
  for (int64_t o = begin; o < end; o += 4) {
    const int64_t count = std::min<int64_t>(4, end - o);
    const W* w[4];
    for (int64_t j = 0; j < 4; ++j) w[j] = weight + (o + std::min(j, count - 1)) * num_inputs;
    for (int64_t r = 0; r < num_rows; ++r) {
      const float* row = x + r * num_inputs;
      V s0 = {}, s1 = {}, s2 = {}, s3 = {};
      for (int64_t i = 0; i < whole; i += kLanesOf<V>) {
        const V v = load<V>(row + i);
        s0 += v * load<V>(w[0] + i);
        s1 += v * load<V>(w[1] + i);
        s2 += v * load<V>(w[2] + i);
        s3 += v * load<V>(w[3] + i);
      }
      if (rest > 0) {
        const V v = load<V>(row + whole, rest);
        s0 += v * load<V>(w[0] + whole, rest);
        s1 += v * load<V>(w[1] + whole, rest);
        s2 += v * load<V>(w[2] + whole, rest);
        s3 += v * load<V>(w[3] + whole, rest);
      }
      const float all[4] = {sum(s0), sum(s1), sum(s2), sum(s3)};
      std::copy_n(all, count, sums + r * num_outputs + o);
    }
  }
}

// y = sums * row_scale * scale + bias for `count` outputs of one row; scale and bias may be null.
template <class V, class T>
CALDERA_INLINE void finish(const float* sums, float row_scale, const float* scale, const T* bias, T* y,
                           int64_t count) {
  for (int64_t i = 0; i < count; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, count - i);
    V v = load<V>(sums + i, n);
    if (scale) v *= row_scale * load<V>(scale + i, n);
    if (bias) v += load<V>(bias + i, n);
    store(y + i, v, n);
  }
}

template <class V, class T>
CALDERA_INLINE void restore(const int8_t* values, const float* scale, T* out, int64_t num_rows,
                            int64_t width) {
  for (int64_t r = 0; r < num_rows; ++r, values += width, out += width) {
    for (int64_t i = 0; i < width; i += kLanesOf<V>) {
      const int64_t n = std::min(kLanesOf<V>, width - i);
      store(out + i, load<V>(values + i, n) * scale[r], n);
    }
  }
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
      simd::run<CALDERA_EACH_WIDTH(restore, T)>(values + begin * I, scale + begin, data + begin * I,
                                                end - begin, I);
    });
  });
  return out;
}

template <class V>
CALDERA_INLINE void widen(const c10::BFloat16* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanesOf<V>) {
    const int64_t n = std::min(kLanesOf<V>, count - i);
    store(out + i, load<V>(x + i, n), n);
  }
}

// The rows in float32.
class Floats {
 public:
  Floats(const float* x, int64_t) : data_(x) {}
  Floats(const c10::BFloat16* x, int64_t count)
      : widened_(static_cast<size_t>(count)), data_(widened_.data()) {
    simd::run<CALDERA_EACH_WIDTH(widen)>(x, widened_.data(), count);
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> widened_;
  const float* data_;
};

// y [N, O] from sums [N, O] that `fill(sums, begin, end)` computes for its part of the outputs. Parts begin
// at multiples of four: the borders between threads change no bit. `row_scale` [N] and `scale` [O] may be
// null.
template <class T, class Fill>
at::Tensor outputs(const at::Tensor& x_NI, int64_t O, const float* row_scale, const float* scale,
                   const at::Tensor& bias_O, const Fill& fill) {
  const int64_t N = x_NI.size(0), I = x_NI.size(1);
  CALDERA_ASSERT(!bias_O.defined() || (bias_O.scalar_type() == x_NI.scalar_type() && bias_O.is_contiguous()));
  const at::Tensor y_NO = at::empty({N, O}, x_NI.options()),
                   sums_NO = std::is_same_v<T, float> ? y_NO : at::empty({N, O}, at::kFloat);
  const T* bias = bias_O.defined() ? bias_O.const_data_ptr<T>() : nullptr;
  T* y = y_NO.mutable_data_ptr<T>();
  float* sums = sums_NO.mutable_data_ptr<float>();
  at::parallel_for(0, (O + 3) / 4, std::max<int64_t>(1, row_grain(I) / 4), [&](int64_t first, int64_t last) {
    const int64_t begin = 4 * first, end = std::min(O, 4 * last);
    fill(sums, begin, end);
    for (int64_t r = 0; r < N; ++r)
      simd::run<CALDERA_EACH_WIDTH(finish, T)>(sums + r * O + begin, row_scale ? row_scale[r] : 1.0f,
                                               scale ? scale + begin : nullptr, bias ? bias + begin : nullptr,
                                               y + r * O + begin, end - begin);
  });
  return y_NO;
}

// Weights of x's own type.
template <class T>
at::Tensor run(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& bias_O) {
  const int64_t N = x_NI.size(0), I = x_NI.size(1), O = weight_OI.size(0);
  const T *x = x_NI.const_data_ptr<T>(), *weight = weight_OI.const_data_ptr<T>();
#ifdef __x86_64__
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (has_bf16_products())
      return outputs<T>(x_NI, O, nullptr, nullptr, bias_O, [&](float* sums, int64_t begin, int64_t end) {
        bf16_sums(x, weight, sums, N, I, O, begin, end);
      });
  }
  if (cpu().avx2)
    return outputs<T>(x_NI, O, nullptr, nullptr, bias_O, [&](float* sums, int64_t begin, int64_t end) {
      if constexpr (std::is_same_v<T, float>)
        avx2::float_sums(x, weight, sums, N, I, O, begin, end);
      else
        avx2::bf16_sums(x, weight, sums, N, I, O, begin, end);
    });
#endif
  const Floats floats(x, N * I);
  return outputs<T>(x_NI, O, nullptr, nullptr, bias_O, [&](float* sums, int64_t begin, int64_t end) {
    sums_of<Vec4>(floats.data(), weight, sums, N, I, O, begin, end);
  });
}

template <class T>
at::Tensor run(const at::Tensor& x_NI, const Int8Weight& weight, const at::Tensor& bias_O) {
  const int64_t N = x_NI.size(0), I = x_NI.size(1), O = weight.values_OI.size(0);
  const int8_t* values = weight.values_OI.const_data_ptr<int8_t>();
  const float* scale = weight.scale_O.const_data_ptr<float>();
  const Floats floats(x_NI.const_data_ptr<T>(), N * I);
#ifdef __x86_64__
  if (has_int8_products() && I <= 65536) {
    const SplitRows rows = split_rows(floats.data(), N, I);
    const int32_t* value_sums = weight.sum_O.const_data_ptr<int32_t>();
    return outputs<T>(x_NI, O, rows.scale.data(), scale, bias_O,
                      [&](float* sums, int64_t begin, int64_t end) {
                        int8_sums(rows, values, value_sums, sums, N, I, O, begin, end);
                      });
  }
  if (cpu().avx2) {
    const ShortRows rows = short_rows(floats.data(), N, I);
    return outputs<T>(x_NI, O, rows.scale.data(), scale, bias_O,
                      [&](float* sums, int64_t begin, int64_t end) {
                        avx2::int8_sums(rows, values, sums, N, I, O, begin, end);
                      });
  }
#endif
  return outputs<T>(x_NI, O, nullptr, scale, bias_O, [&](float* sums, int64_t begin, int64_t end) {
    sums_of<Vec4>(floats.data(), values, sums, N, I, O, begin, end);
  });
}

// Calls run() for rows of float32 or bfloat16.
template <class Weight>
at::Tensor dispatch(const at::Tensor& x_NI, const Weight& weight, const at::Tensor& bias_O) {
  at::Tensor y_NO;
  with_cpu_type(x_NI, [&]<class T>(T*) { y_NO = run<T>(x_NI.contiguous(), weight, bias_O); });
  return y_NO;
}

thread_local bool few_rows = false;

}  // namespace

FewRowsGuard::FewRowsGuard() : before_(std::exchange(few_rows, true)) {}
FewRowsGuard::~FewRowsGuard() { few_rows = before_; }
bool FewRowsGuard::active() { return few_rows && !at::GradMode::is_enabled(); }

at::Tensor affine_few_rows(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& bias_O) {
  CALDERA_ASSERT(weight_OI.is_contiguous() && x_NI.size(1) == weight_OI.size(1) &&
                 weight_OI.scalar_type() == x_NI.scalar_type());
  return dispatch(x_NI, weight_OI, bias_O);
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
  if (x_NI.size(0) <= 4) return dispatch(x_NI, weight, bias_O);
  return affine(x_NI, restored(weight, x_NI.scalar_type()), bias_O);
}

}  // namespace caldera
