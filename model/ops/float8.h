// Matrix products in 8-bit floats for training, as torchao's "rowwise" recipe computes them: both factors
// rounded to e4m3 (3 bits of mantissa, at most 448) with a scale for each row of the one and each column of
// the other, a power of two; sums in float32, the product in bfloat16. On a GPU the tensor cores' own
// products (at::_scaled_mm with use_fast_accum, compute capability 8.9 and up); elsewhere the same rounded
// values multiplied in bfloat16, which holds them exactly.
#pragma once

#include <string>

#include "base/aten.h"

namespace caldera {

// Values [N, K] e4m3 and scale [N, 1] float32: a row is its values times its scale.
struct Float8Rows {
  at::Tensor values_NK, scale_N1;
};
// Of bfloat16 rows of any strides. A row with a value that is not finite comes back as NaN.
Float8Rows quantize_float8(const at::Tensor& x_NK);

// a [M, K] times b [K, N], bfloat16, of any strides -> [M, N]. K is filled up with zeros to a multiple of 16,
// N must be one. No gradients.
at::Tensor float8_product(const at::Tensor& a_MK, const at::Tensor& b_KN);

// Throws ConfigError unless layers on `device` can compute so.
void check_float8(at::Device device);
// What it says of a GPU of compute capability major.minor = capability / 10; empty where it can.
std::string float8_fault(int capability);

}  // namespace caldera
