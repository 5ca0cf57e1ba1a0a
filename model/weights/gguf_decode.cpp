// ggml's types of tensors as float32: the layouts of ggml-common.h, the numbers of the `gguf` package, bit
// for bit.
#include <ATen/Parallel.h>

#include <cstring>

#include "base/error.h"
#include "model/weights/gguf_weights.h"

namespace caldera {
namespace {

constexpr int64_t kSmall = 32, kSuper = 256;  // elements of a block, and of one of the "K" types

float half_at(const std::byte* bytes) {
  c10::Half value;
  std::memcpy(&value, bytes, sizeof value);
  return static_cast<float>(value);
}

int byte_at(const std::byte* bytes, int64_t i) { return std::to_integer<int>(bytes[i]); }

// One block of 32 elements: a scale (and an offset), then the quants; of two 4-bit quants in a byte the low
// one is element j, the high one element j + 16. The fifth bits are together in 32.
void unpack_q4_0(const std::byte* block, float* out) {
  const float scale = half_at(block);
  for (int64_t j = 0; j < kSmall / 2; ++j) {
    const int byte = byte_at(block + 2, j);
    out[j] = static_cast<float>((byte & 15) - 8) * scale;
    out[j + kSmall / 2] = static_cast<float>((byte >> 4) - 8) * scale;
  }
}

void unpack_q4_1(const std::byte* block, float* out) {
  const float scale = half_at(block), offset = half_at(block + 2);
  for (int64_t j = 0; j < kSmall / 2; ++j) {
    const int byte = byte_at(block + 4, j);
    out[j] = static_cast<float>(byte & 15) * scale + offset;
    out[j + kSmall / 2] = static_cast<float>(byte >> 4) * scale + offset;
  }
}

// The quants of a block of 5 bits, 0 to 31.
void unpack_5_bits(const std::byte* high, const std::byte* low, int* quants) {
  uint32_t bits;
  std::memcpy(&bits, high, sizeof bits);
  for (int64_t j = 0; j < kSmall / 2; ++j) {
    const int byte = byte_at(low, j);
    quants[j] = (byte & 15) | static_cast<int>((bits >> j) & 1) << 4;
    quants[j + kSmall / 2] = (byte >> 4) | static_cast<int>((bits >> (j + kSmall / 2)) & 1) << 4;
  }
}

void unpack_q5_0(const std::byte* block, float* out) {
  const float scale = half_at(block);
  int quants[kSmall];
  unpack_5_bits(block + 2, block + 6, quants);
  for (int64_t j = 0; j < kSmall; ++j) out[j] = static_cast<float>(quants[j] - 16) * scale;
}

void unpack_q5_1(const std::byte* block, float* out) {
  const float scale = half_at(block), offset = half_at(block + 2);
  int quants[kSmall];
  unpack_5_bits(block + 4, block + 8, quants);
  for (int64_t j = 0; j < kSmall; ++j) out[j] = static_cast<float>(quants[j]) * scale + offset;
}

void unpack_q8_0(const std::byte* block, float* out) {
  const float scale = half_at(block);
  for (int64_t j = 0; j < kSmall; ++j)
    out[j] = static_cast<float>(std::to_integer<int8_t>(block[2 + j])) * scale;
}

// Q4_K and Q5_K: eight blocks of 32 with a scale and an offset of 6 bits each, which twelve bytes hold: the
// low bits of the first four, then of their offsets; the others' low nibbles, with their two high bits in the
// first eight bytes' tops.
void unpack_scale(const std::byte* packed, int64_t j, int* scale, int* offset) {
  if (j < 4) {
    *scale = byte_at(packed, j) & 63;
    *offset = byte_at(packed, j + 4) & 63;
  } else {
    *scale = (byte_at(packed, j + 4) & 15) | (byte_at(packed, j - 4) >> 6) << 4;
    *offset = byte_at(packed, j + 4) >> 4 | (byte_at(packed, j) >> 6) << 4;
  }
}

// `high`: the fifth bits (bit j of byte l: element l of block j), or null.
void unpack_k(const std::byte* block, const std::byte* high, const std::byte* low, float* out) {
  const float scale_of_all = half_at(block), offset_of_all = half_at(block + 2);
  for (int64_t j = 0; j < kSuper / kSmall; ++j) {
    int scale_6bit, offset_6bit;
    unpack_scale(block + 4, j, &scale_6bit, &offset_6bit);
    const float scale = scale_of_all * static_cast<float>(scale_6bit),
                offset = offset_of_all * static_cast<float>(offset_6bit);
    for (int64_t l = 0; l < kSmall; ++l) {
      int quant = (byte_at(low, j / 2 * kSmall + l) >> (4 * (j % 2))) & 15;
      if (high != nullptr) quant |= ((byte_at(high, l) >> j) & 1) << 4;
      out[j * kSmall + l] = scale * static_cast<float>(quant) - offset;
    }
  }
}
void unpack_q4_k(const std::byte* block, float* out) { unpack_k(block, nullptr, block + 16, out); }
void unpack_q5_k(const std::byte* block, float* out) { unpack_k(block, block + 16, block + 48, out); }

// Sixteen blocks of 16 with a signed scale of 8 bits each; quants of 4 low bits (128 bytes), then of 2 high
// ones (64).
void unpack_q6_k(const std::byte* block, float* out) {
  const std::byte *low = block, *high = block + 128, *scales = block + 192;
  const float scale_of_all = half_at(block + 208);
  for (int64_t i = 0; i < kSuper; ++i) {
    const int64_t half = i / 128, quarter = i % 128 / kSmall, l = i % kSmall;
    const int four = (byte_at(low, half * 64 + quarter % 2 * kSmall + l) >> (quarter / 2 * 4)) & 15;
    const int two = (byte_at(high, half * kSmall + l) >> (2 * quarter)) & 3;
    const float scale = scale_of_all * static_cast<float>(std::to_integer<int8_t>(scales[i / 16]));
    out[i] = scale * static_cast<float>((four | two << 4) - 32);
  }
}

struct Unpacker {
  uint32_t type;  // ggml's number
  int64_t block_elements, block_bytes;
  void (*unpack_block)(const std::byte*, float*);
};
constexpr Unpacker kUnpackers[] = {{2, kSmall, 18, unpack_q4_0},   {3, kSmall, 20, unpack_q4_1},
                                   {6, kSmall, 22, unpack_q5_0},   {7, kSmall, 24, unpack_q5_1},
                                   {8, kSmall, 34, unpack_q8_0},   {12, kSuper, 144, unpack_q4_k},
                                   {13, kSuper, 176, unpack_q5_k}, {14, kSuper, 210, unpack_q6_k}};

at::Tensor unpack(const GgufTensor& tensor, const Unpacker& type) {
  at::Tensor out = at::empty(tensor.shape, at::kFloat);
  float* elements = out.mutable_data_ptr<float>();
  at::parallel_for(0, out.numel() / type.block_elements, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      type.unpack_block(tensor.bytes.data() + i * type.block_bytes, elements + i * type.block_elements);
  });
  return out;
}

at::Tensor copy_bytes(const GgufTensor& tensor, at::ScalarType type) {
  at::Tensor out = at::empty(tensor.shape, type);
  CALDERA_ASSERT(out.nbytes() == tensor.bytes.size());
  std::memcpy(out.mutable_data_ptr(), tensor.bytes.data(), tensor.bytes.size());
  return out;
}

}  // namespace

at::Tensor dequantize(const GgufTensor& tensor, const std::string& where) {
  if (tensor.type == 0) return copy_bytes(tensor, at::kFloat);
  if (tensor.type == 1) return copy_bytes(tensor, at::kHalf);
  if (tensor.type == 30) return copy_bytes(tensor, at::kBFloat16);
  for (const Unpacker& type : kUnpackers)
    if (tensor.type == type.type) return unpack(tensor, type);
  throw CheckpointError(
      fmt::format("{}: {}: ggml type {} is not supported; F32 (0), F16 (1), BF16 (30), Q4_0 (2), Q4_1 (3), "
                  "Q5_0 (6), Q5_1 "
                  "(7), Q8_0 (8), Q4_K (12), Q5_K (13) and Q6_K (14) are",
                  where, tensor.name, tensor.type));
}

}  // namespace caldera
