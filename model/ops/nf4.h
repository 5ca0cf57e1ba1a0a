// Frozen weights in 4 bits: NormalFloat blocks, as QLoRA has them (Dettmers et al., arXiv 2305.14314), with
// the numbers of bitsandbytes' quantize_4bit(quant_type="nf4", blocksize=64) and dequantize_4bit. Legend: T
// rows of x, I inputs, O outputs.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "base/aten.h"
#include "model/ops/dynamic_map.h"

namespace caldera {

inline constexpr int64_t kNf4Block = 64;  // elements that share a scale, their largest magnitude

// The 16 ascending values in [-1, 1], zero among them, that a code of 4 bits stands for.
const std::array<float, 16>& nf4_values();

// A tensor in 4 bits; blocks are ranges of the flattened one.
struct Nf4Tensor {
  std::vector<int64_t> shape;
  at::Tensor codes;  // uint8 [ceil(numel / 2)]: two elements a byte, the first one in the upper half
  // A scale a block: float32 in `scale`, or (double quantisation) dequantize_dynamic(scale_codes) + offset.
  at::Tensor scale;
  Quantized scale_codes;
  float offset = 0;

  int64_t numel() const { return c10::multiply_integers(shape); }
  int64_t num_bytes() const;
};

// Of float32 or bfloat16 values on the CPU, codes and scales on `device`. On the meta device they have shapes
// alone and no value is read. A block with a value that is not finite comes back as NaN.
Nf4Tensor quantize_nf4(const at::Tensor& values, bool double_quant, at::Device device = at::kCPU);
// Into `out`, dense, of as many elements, float32 or bfloat16, on the tensor's device.
void dequantize_nf4_into(const Nf4Tensor& tensor, const at::Tensor& out);

// The weight [O, I] of a linear layer, of whose rows each part is quantised by itself.
struct Nf4Weight {
  std::vector<Nf4Tensor> parts;

  int64_t num_inputs() const { return parts[0].shape[1]; }
  int64_t num_outputs() const;
  int64_t num_bytes() const;
};

// affine() (matmul.h) by the weight as it comes out of its 4 bits in x's dtype, for as long as the product
// takes. Differentiable in x alone, of which nothing is kept: backward restores the weight again.
// `needs_value` as affine's.
at::Tensor affine_nf4(const at::Tensor& x_TI, const Nf4Weight& weight, const at::Tensor& bias_O = {},
                      bool needs_value = true);

}  // namespace caldera
