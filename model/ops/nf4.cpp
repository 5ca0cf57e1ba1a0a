#include "model/ops/nf4.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/cuda/launch.h"
#include "model/ops/matmul.h"
#include "model/ops/simd.h"

namespace caldera {
namespace {

using namespace simd;

constexpr int64_t kGrainNf4Blocks = 512;  // for a thread of its own

// borders[i] lies between values i and i + 1: what is above it gets the greater code.
std::array<float, 15> borders_between(const std::array<float, 16>& values) {
  std::array<float, 15> borders;
  for (size_t i = 0; i < borders.size(); ++i) borders[i] = (values[i] + values[i + 1]) / 2;
  return borders;
}

template <class V>
CALDERA_INLINE void encode_blocks(const float* x, int64_t count, const std::array<float, 15>& borders,
                                  uint8_t* codes, float* scale, int64_t first_block, int64_t last_block) {
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kNf4Block, size = std::min(kNf4Block, count - begin);
    V most = {}, fault = {};  // NaN where a value is not finite
    for (int64_t i = 0; i < size; i += kLanesOf<V>) {
      const V v = load<V>(x + begin + i, std::min(kLanesOf<V>, size - i));
      most = simd::max(most, simd::max(v, V(-v)));
      fault += v * 0.0f;
    }
    const float absmax = maximum(most), factor = 1.0f / std::max(absmax, 1e-38f);
    scale[block] = absmax + sum(fault);
    int32_t lanes[kNf4Block];  // those behind the last element count as zeros, as its byte's other half does
    for (int64_t i = 0; i < size; i += kLanesOf<V>) {
      const V v = load<V>(x + begin + i, std::min(kLanesOf<V>, size - i)) * factor;
      typename TypesOf<V>::Ints code = {};
      for (const float border : borders) code -= v > splat<V>(border);
      std::memcpy(lanes + i, &code, sizeof code);
    }
    for (int64_t i = 0; i < size; i += 2)
      codes[(begin + i) / 2] = static_cast<uint8_t>(lanes[i] << 4 | lanes[i + 1]);
  }
}

// The two values of each byte.
struct Pairs {
  float values[256][2];
};
const Pairs& pairs() {
  static const Pairs table = [] {
    Pairs result;
    for (size_t byte = 0; byte < 256; ++byte) {
      result.values[byte][0] = nf4_values()[byte >> 4];
      result.values[byte][1] = nf4_values()[byte & 15];
    }
    return result;
  }();
  return table;
}

// `scale` holds those of the blocks from the first one on.
template <class V, class T>
CALDERA_INLINE void decode_blocks(const uint8_t* codes, const float* scale, const Pairs& table, T* out,
                                  int64_t count, int64_t first_block, int64_t last_block) {
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kNf4Block, size = std::min(kNf4Block, count - begin);
    float unit[kNf4Block];
    for (int64_t i = 0; i < size; i += 2) std::memcpy(unit + i, table.values[codes[(begin + i) / 2]], 8);
    const float by = scale[block - first_block];
    for (int64_t i = 0; i < size; i += kLanesOf<V>) {
      const int64_t n = std::min(kLanesOf<V>, size - i);
      store(out + begin + i, V(load<V>(unit + i, n) * by), n);
    }
  }
}

// The scales of some blocks.
void fill_scales(const Nf4Tensor& tensor, float* out, int64_t first_block, int64_t last_block) {
  if (tensor.scale.defined()) {
    std::copy_n(tensor.scale.const_data_ptr<float>() + first_block, last_block - first_block, out);
    return;
  }
  const std::array<float, 256>& map = dynamic_map(true);
  const uint8_t* codes = tensor.scale_codes.codes.const_data_ptr<uint8_t>();
  const float* group = tensor.scale_codes.scale.const_data_ptr<float>();
  for (int64_t block = first_block; block < last_block; ++block)
    *out++ = map[codes[block]] * group[block / kQuantizedBlock] + tensor.offset;
}

void dequantize_on_cuda(const Nf4Tensor& tensor, const at::Tensor& out) {
  cuda::Nf4Scales scales;
  if (tensor.scale.defined()) {
    scales.scale = cuda::in<float>(tensor.scale);
  } else {
    scales.codes = tensor.scale_codes.codes.const_data_ptr<uint8_t>();
    scales.group_scale = cuda::in<float>(tensor.scale_codes.scale);
    scales.map = code_tables_on(out.device())->exp_avg.values;  // an address: nothing is read here
    scales.offset = tensor.offset;
  }
  cuda::with_type(out, [&]<class T>(T*, cuda::Stream stream) {
    cuda::dequantize_nf4(tensor.codes.const_data_ptr<uint8_t>(), scales, nf4_values(), cuda::out<T>(out),
                         out.numel(), stream);
  });
}

at::Tensor restored(const Nf4Weight& weight, const at::TensorOptions& options) {
  const at::Tensor out_OI =
      at::empty({weight.num_outputs(), weight.num_inputs()}, options.requires_grad(false));
  int64_t row = 0;
  for (const Nf4Tensor& part : weight.parts) {
    dequantize_nf4_into(part, out_OI.narrow(0, row, part.shape[0]));
    row += part.shape[0];
  }
  return out_OI;
}

struct WeightHolder : torch::CustomClassHolder {
  explicit WeightHolder(Nf4Weight held) : weight(std::move(held)) {}
  Nf4Weight weight;
};

struct AffineNf4Function : torch::autograd::Function<AffineNf4Function> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_TI, const Nf4Weight& weight,
                            const std::optional<at::Tensor>& bias_O, bool needs_value) {
    ctx->saved_data["weight"] = c10::IValue::make_capsule(c10::make_intrusive<WeightHolder>(weight));
    if (!needs_value)
      return at::empty({x_TI.size(0), weight.num_outputs()}, x_TI.options().requires_grad(false));
    return affine(x_TI, restored(weight, x_TI.options()), bias_O.value_or(at::Tensor()));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto holder =
        c10::static_intrusive_pointer_cast<WeightHolder>(ctx->saved_data["weight"].toCapsule());
    return {matrix_product(grads[0].contiguous(), restored(holder->weight, grads[0].options())), {}, {}, {}};
  }
};

}  // namespace

const std::array<float, 16>& nf4_values() {
  static constexpr std::array<float, 16> kValues = {-1.0f,
                                                    -0.6961928009986877f,
                                                    -0.5250730514526367f,
                                                    -0.39491748809814453f,
                                                    -0.28444138169288635f,
                                                    -0.18477343022823334f,
                                                    -0.09105003625154495f,
                                                    0.0f,
                                                    0.07958029955625534f,
                                                    0.16093020141124725f,
                                                    0.24611230194568634f,
                                                    0.33791524171829224f,
                                                    0.44070982933044434f,
                                                    0.5626170039176941f,
                                                    0.7229568362236023f,
                                                    1.0f};
  return kValues;
}

int64_t Nf4Tensor::num_bytes() const {
  int64_t bytes = 0;
  for (const at::Tensor& tensor : {codes, scale, scale_codes.codes, scale_codes.scale})
    if (tensor.defined()) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

Nf4Tensor quantize_nf4(const at::Tensor& values, bool double_quant, at::Device device) {
  const at::NoGradGuard no_grad;
  const int64_t count = values.numel(), blocks = (count + kNf4Block - 1) / kNf4Block;
  Nf4Tensor result{.shape = values.sizes().vec()};
  if (device.is_meta()) {
    const auto bytes = at::TensorOptions(at::kByte).device(device), floats = bytes.dtype(at::kFloat);
    result.codes = at::empty({(count + 1) / 2}, bytes);
    if (double_quant)
      result.scale_codes = {at::empty({blocks}, bytes),
                            at::empty({(blocks + kQuantizedBlock - 1) / kQuantizedBlock}, floats)};
    else
      result.scale = at::empty({blocks}, floats);
    return result;
  }
  CALDERA_ASSERT(has_cpu_kernel(values));
  const at::Tensor x = values.detach().to(at::kFloat).contiguous();
  const at::Tensor codes = at::empty({(count + 1) / 2}, at::kByte), scale = at::empty({blocks}, at::kFloat);
  static const std::array<float, 15> borders = borders_between(nf4_values());
  at::parallel_for(0, blocks, kGrainNf4Blocks, [&](int64_t begin, int64_t end) {
    simd::run<CALDERA_EACH_WIDTH(encode_blocks)>(
        x.const_data_ptr<float>(), count, borders, codes.mutable_data_ptr<uint8_t>(),
        scale.mutable_data_ptr<float>(), begin, end);
  });
  result.codes = codes.to(device);
  if (!double_quant) {
    result.scale = scale.to(device);
    return result;
  }
  const at::Tensor offset = scale.mean();
  const Quantized quantized = quantize_dynamic(scale - offset, /*is_signed=*/true);
  result.scale_codes = {quantized.codes.to(device), quantized.scale.to(device)};
  result.offset = offset.item<float>();
  return result;
}

void dequantize_nf4_into(const Nf4Tensor& tensor, const at::Tensor& out) {
  const int64_t count = tensor.numel();
  CALDERA_ASSERT(out.is_contiguous() && out.numel() == count && has_kernel(out) &&
                 tensor.codes.device() == out.device());
  CALDERA_PROFILED("dequantize_nf4");
  if (out.is_cuda()) return dequantize_on_cuda(tensor, out);
  const uint8_t* codes = tensor.codes.const_data_ptr<uint8_t>();
  const Pairs& table = pairs();
  with_cpu_type(out, [&]<class T>(T*) {
    T* data = out.mutable_data_ptr<T>();
    at::parallel_for(0, (count + kNf4Block - 1) / kNf4Block, kGrainNf4Blocks, [&](int64_t begin, int64_t end) {
      constexpr int64_t kAtOnce = 256;
      float scales[kAtOnce];
      for (int64_t block = begin; block < end; block += kAtOnce) {
        const int64_t last = std::min(end, block + kAtOnce);
        fill_scales(tensor, scales, block, last);
        simd::run<CALDERA_EACH_WIDTH(decode_blocks, T)>(codes, scales, table, data, count, block, last);
      }
    });
  });
}

int64_t Nf4Weight::num_outputs() const {
  int64_t rows = 0;
  for (const Nf4Tensor& part : parts) rows += part.shape[0];
  return rows;
}

int64_t Nf4Weight::num_bytes() const {
  int64_t bytes = 0;
  for (const Nf4Tensor& part : parts) bytes += part.num_bytes();
  return bytes;
}

at::Tensor affine_nf4(const at::Tensor& x_TI, const Nf4Weight& weight, const at::Tensor& bias_O,
                      bool needs_value) {
  CALDERA_ASSERT(x_TI.dim() == 2 && x_TI.size(1) == weight.num_inputs());
  CALDERA_ASSERT(!bias_O.defined() || !wants_grad(bias_O));
  if (!wants_grad(x_TI)) return affine(x_TI, restored(weight, x_TI.options()), bias_O);
  return AffineNf4Function::apply(x_TI, weight, given(bias_O), needs_value);
}

}  // namespace caldera
