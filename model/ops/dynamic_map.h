// Tensors in 8 bits for optimizer states: block-wise dynamic quantisation (Dettmers et al., "8-bit Optimizers
// via Block-wise Quantization", arXiv 2110.02861), the numbers of bitsandbytes' create_dynamic_map and
// quantize_blockwise.
#pragma once

#include <array>
#include <cstdint>

#include "base/aten.h"
#include "model/ops/code_tables.h"

namespace caldera {

inline constexpr int64_t kQuantizedBlock = 256;  // elements that share a scale

// 256 ascending values, dense near zero: seven powers of ten with ever more steps, zero and one. Signed: in
// [-0.993, 1]; unsigned: in [0, 1].
const std::array<float, 256>& dynamic_map(bool is_signed);
// Values as codes into a dynamic map times the largest magnitude of their block; blocks are ranges of the
// flattened tensor.
struct Quantized {
  at::Tensor codes;  // uint8, the values' shape
  at::Tensor scale;  // float32 [ceil(numel / kQuantizedBlock)]
};

// Of float32 values, on any device: the nearest code, the lower of two that are as near.
Quantized quantize_dynamic(const at::Tensor& values, bool is_signed);
// Float32, in the codes' shape.
at::Tensor dequantize_dynamic(const Quantized& quantized, bool is_signed);

// The same search for kernels: codes[i] is the nearest code to a value in [-1, 1].
class CodeSearch {
 public:
  static const CodeSearch& of(bool is_signed);
  [[gnu::always_inline]] inline uint8_t operator()(float value) const {
    const auto bits = __builtin_bit_cast(uint32_t, value);
    const auto magnitude = static_cast<int32_t>((bits & 0x7FFFFFFFu) >> 16) - kFirstCell;
    const auto cell = static_cast<uint32_t>(magnitude < 0           ? 0
                                            : magnitude < kNumCells ? magnitude
                                                                    : kNumCells - 1) +
                      (bits >> 31) * static_cast<uint32_t>(kNumCells);
    const uint8_t code = table_.lowest[cell];
    return static_cast<uint8_t>(code + (value > table_.middles[code] ? 1 : 0));
  }
  const CodeTable<2>& table() const { return table_; }

 private:
  explicit CodeSearch(bool is_signed);
  CodeTable<2> table_;
};

// Of both moments.
CodeTables code_tables();
// The same in a GPU's memory. Every tensor asks for them: a thread copies them once.
const CodeTables* code_tables_on(at::Device device);

}  // namespace caldera
