// Linear layers for a few rows by AVX-512's instructions for narrow types, where processor and build have
// them: memory is then what takes the time. Legend: N rows, I inputs, O outputs.
#pragma once
#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

#ifdef __x86_64__
namespace caldera {

bool has_bf16_products();  // AVX512_BF16
bool has_int8_products();  // AVX512_VNNI

// Outputs [begin, end) of sums [N, O] = x [N, I] weight [O, I]^T. Products are exact, sums in float32.
void bf16_sums(const c10::BFloat16* x, const c10::BFloat16* weight, float* sums, int64_t num_rows,
               int64_t num_inputs, int64_t num_outputs, int64_t begin, int64_t end);

// Rows in 16 bits as in short_rows.h: each value is (256 high + low - 32768) * scale of its row.
struct SplitRows {
  std::vector<uint8_t> high, low;  // [N, I]
  std::vector<float> scale;        // [N]
};
SplitRows split_rows(const float* x, int64_t num_rows, int64_t num_inputs);

// The same of rows in 16 bits and 8-bit weights, the sums of whose rows are given: exact up to the last
// rounding to float32, to be multiplied by the scales of row and weight. At most 65536 inputs.
void int8_sums(const SplitRows& x, const int8_t* weight, const int32_t* weight_sums, float* sums,
               int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t begin, int64_t end);

}  // namespace caldera
#endif
