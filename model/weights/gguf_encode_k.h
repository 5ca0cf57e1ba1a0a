// ggml's quantisers without an importance matrix (quantize_row_..._ref of ggml-quants.c), the same bytes.
// Each packs one block of finite values.
#pragma once

#include <cstddef>

namespace caldera {

void pack_q5_0(const float* x, std::byte* block);  // 32 values
void pack_q5_1(const float* x, std::byte* block);
void pack_q4_k(const float* x, std::byte* block);  // 256 values
void pack_q5_k(const float* x, std::byte* block);
void pack_q6_k(const float* x, std::byte* block);

}  // namespace caldera
