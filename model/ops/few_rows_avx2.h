// Linear layers for a few rows by AVX2 and FMA, where the processor has none of the instructions of
// few_rows_avx512.h: memory is then what takes the time. Legend: N rows, I inputs, O outputs.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>

#include "model/ops/short_rows.h"

#ifdef __x86_64__
namespace caldera::avx2 {

// Outputs [begin, end) of sums [N, O] = x [N, I] weight [O, I]^T, in float32.
void float_sums(const float* x, const float* weight, float* sums, int64_t num_rows, int64_t num_inputs,
                int64_t num_outputs, int64_t begin, int64_t end);
void bf16_sums(const c10::BFloat16* x, const c10::BFloat16* weight, float* sums, int64_t num_rows,
               int64_t num_inputs, int64_t num_outputs, int64_t begin, int64_t end);
// Weights from -127 to 127: exact up to the last rounding to float32, to be multiplied by the scales of row
// and weight.
void int8_sums(const ShortRows& x, const int8_t* weight, float* sums, int64_t num_rows, int64_t num_inputs,
               int64_t num_outputs, int64_t begin, int64_t end);

}  // namespace caldera::avx2
#endif
