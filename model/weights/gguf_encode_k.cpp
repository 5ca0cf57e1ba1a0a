// The order of every sum is the reference's: another one gives other bytes.
#include "model/weights/gguf_encode_k.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "base/aten.h"

namespace caldera {
namespace {

constexpr int kInBlock = 32, kInSuper = 256, kNumBlocks = kInSuper / kInBlock;
constexpr float kAllZero = 1e-15f;

// To the nearest integer, halves to the even one, by the bits of a float whose last one counts units.
int nearest(float value) {
  const float shifted = value + 12582912.0f;
  int bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return (bits & 0x007fffff) - 0x00400000;
}

void put_half(float value, std::byte* out) {
  const c10::Half half = value;
  std::memcpy(out, &half, sizeof half);
}
float get_half(const std::byte* bytes) {
  c10::Half half;
  std::memcpy(&half, bytes, sizeof half);
  return static_cast<float>(half);
}
std::byte to_byte(int value) { return static_cast<std::byte>(static_cast<uint8_t>(value)); }

// The fifth bits of 32 quants together, the others two to a byte.
void put_5_bits(const int* quants, std::byte* high, std::byte* low) {
  uint32_t bits = 0;
  for (int j = 0; j < kInBlock / 2; ++j) {
    const int a = quants[j], b = quants[j + kInBlock / 2];
    low[j] = to_byte((a & 15) | (b & 15) << 4);
    bits |= static_cast<uint32_t>(a >> 4 & 1) << j | static_cast<uint32_t>(b >> 4 & 1) << (j + kInBlock / 2);
  }
  std::memcpy(high, &bits, sizeof bits);
}

// Scale and offset, x = scale * quant + offset with offset <= 0, of least weighted squared error over a
// search of inverse scales around the range's own.
struct Fit {
  float scale = 0, negative_offset = 0;
};
Fit fit_with_offset(const float* x, const float* weights, int largest, float first, int num_steps,
                    int* quants) {
  float low = x[0], high = x[0], sum_w = weights[0], sum_x = sum_w * x[0];
  for (int i = 1; i < kInBlock; ++i) {
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
    sum_w += weights[i];
    sum_x += weights[i] * x[i];
  }
  if (low > 0) low = 0;
  if (high == low) {
    std::fill(quants, quants + kInBlock, 0);
    return {0, -low};
  }
  float inverse = static_cast<float>(largest) / (high - low), scale = 1 / inverse, offset = low;
  const auto error_of_fit = [&](float by, float from, const int* with) {
    float error = 0;
    for (int i = 0; i < kInBlock; ++i) {
      const float difference = by * static_cast<float>(with[i]) + from - x[i];
      error += weights[i] * (difference * difference);
    }
    return error;
  };
  for (int i = 0; i < kInBlock; ++i) quants[i] = std::clamp(nearest(inverse * (x[i] - low)), 0, largest);
  float best = error_of_fit(scale, offset, quants);
  for (int step = 0; step <= num_steps; ++step) {
    // The reference's search measures from the best offset so far.
    inverse = (first + 0.1f * static_cast<float>(step) + static_cast<float>(largest)) / (high - offset);
    int tried[kInBlock];
    float sum_l = 0, sum_l2 = 0, sum_xl = 0;
    for (int i = 0; i < kInBlock; ++i) {
      tried[i] = std::clamp(nearest(inverse * (x[i] - offset)), 0, largest);
      const auto l = static_cast<float>(tried[i]);
      sum_l += weights[i] * l;
      sum_l2 += weights[i] * l * l;
      sum_xl += weights[i] * l * x[i];
    }
    const float determinant = sum_w * sum_l2 - sum_l * sum_l;
    if (!(determinant > 0)) continue;
    float this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant,
          this_offset = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
    if (this_offset > 0) {
      this_offset = 0;
      this_scale = sum_xl / sum_l2;
    }
    const float error = error_of_fit(this_scale, this_offset, tried);
    if (error >= best) continue;
    std::copy(tried, tried + kInBlock, quants);
    best = error;
    scale = this_scale;
    offset = this_offset;
  }
  return {scale, -offset};
}

// Q4_K and Q5_K up to their quants: the two float16 numbers, the twelve bytes of scales and offsets, the
// quants.
void fit_super_block(const float* x, int largest, float first, int num_steps, std::byte* block, int* quants) {
  Fit fits[kNumBlocks];
  float max_scale = 0, max_offset = 0;
  for (int j = 0; j < kNumBlocks; ++j) {
    const float* values = x + j * kInBlock;
    float squares = 0, weights[kInBlock];
    for (int l = 0; l < kInBlock; ++l) squares += values[l] * values[l];
    const float typical = std::sqrt(squares / kInBlock);
    for (int l = 0; l < kInBlock; ++l) weights[l] = typical + std::abs(values[l]);
    fits[j] = fit_with_offset(values, weights, largest, first, num_steps, quants + j * kInBlock);
    max_scale = std::max(max_scale, fits[j].scale);
    max_offset = std::max(max_offset, fits[j].negative_offset);
  }
  const float inverse_scale = max_scale > 0 ? 63.0f / max_scale : 0,
              inverse_offset = max_offset > 0 ? 63.0f / max_offset : 0;
  int scales[kNumBlocks], offsets[kNumBlocks];
  uint8_t packed[12] = {};
  for (int j = 0; j < kNumBlocks; ++j) {
    // Through a byte, as the reference: a negative scale becomes large, and then 63.
    scales[j] = std::min<int>(63, static_cast<uint8_t>(nearest(inverse_scale * fits[j].scale)));
    offsets[j] = std::min<int>(63, static_cast<uint8_t>(nearest(inverse_offset * fits[j].negative_offset)));
    if (j < 4) {
      packed[j] = static_cast<uint8_t>(scales[j]);
      packed[j + 4] = static_cast<uint8_t>(offsets[j]);
    } else {
      packed[j + 4] = static_cast<uint8_t>((scales[j] & 15) | (offsets[j] & 15) << 4);
      packed[j - 4] = static_cast<uint8_t>(packed[j - 4] | scales[j] >> 4 << 6);
      packed[j] = static_cast<uint8_t>(packed[j] | offsets[j] >> 4 << 6);
    }
  }
  put_half(max_scale / 63.0f, block);
  put_half(max_offset / 63.0f, block + 2);
  std::memcpy(block + 4, packed, sizeof packed);
  // The quants once more, by the scales and offsets as they are stored.
  for (int j = 0; j < kNumBlocks; ++j) {
    const float scale = get_half(block) * static_cast<float>(scales[j]);
    if (scale == 0) continue;
    const float offset = get_half(block + 2) * static_cast<float>(offsets[j]);
    for (int l = j * kInBlock; l < (j + 1) * kInBlock; ++l)
      quants[l] = std::clamp(nearest((x[l] + offset) / scale), 0, largest);
  }
}

// Scale of 16 values, x = scale * (quant - 32), of least error weighted by x^2 over a search of inverse
// scales.
float fit_without_offset(const float* x, int* quants) {
  constexpr int kNum = 16, kHalf = 32;
  float largest = 0, magnitude = 0;
  for (int i = 0; i < kNum; ++i)
    if (std::abs(x[i]) > magnitude) {
      magnitude = std::abs(x[i]);
      largest = x[i];
    }
  std::fill(quants, quants + kNum, 0);
  if (magnitude < kAllZero) return 0;
  const auto quant_of = [&](float inverse, int i) {
    return std::clamp(nearest(inverse * x[i]), -kHalf, kHalf - 1);
  };
  float scale = 0, best = 0;
  const auto attempt = [&](float inverse, bool is_first) {
    float sum_xl = 0, sum_l2 = 0;
    for (int i = 0; i < kNum; ++i) {
      const auto l = static_cast<float>(quant_of(inverse, i));
      const float weight = x[i] * x[i];
      sum_xl += weight * x[i] * l;
      sum_l2 += weight * l * l;
    }
    if (!is_first && !(sum_l2 > 0 && sum_xl * sum_xl > best * sum_l2)) return;
    for (int i = 0; i < kNum; ++i) quants[i] = quant_of(inverse, i) + kHalf;
    scale = sum_l2 != 0 ? sum_xl / sum_l2 : 0.0f;
    best = scale * sum_xl;
  };
  attempt(-static_cast<float>(kHalf) / largest, true);
  for (int step = -9; step <= 9; ++step)
    if (step != 0) attempt(-(static_cast<float>(kHalf) + 0.1f * static_cast<float>(step)) / largest, false);
  return scale;
}

}  // namespace

void pack_q5_0(const float* x, std::byte* block) {
  float largest = 0, magnitude = 0;
  for (int j = 0; j < kInBlock; ++j)
    if (magnitude < std::abs(x[j])) {
      magnitude = std::abs(x[j]);
      largest = x[j];
    }
  const float scale = largest / -16, inverse = scale != 0 ? 1.0f / scale : 0.0f;
  int quants[kInBlock];
  for (int j = 0; j < kInBlock; ++j) quants[j] = std::min(31, static_cast<int>(x[j] * inverse + 16.5f));
  put_half(scale, block);
  put_5_bits(quants, block + 2, block + 6);
}

void pack_q5_1(const float* x, std::byte* block) {
  const auto [low, high] = std::minmax_element(x, x + kInBlock);
  const float scale = (*high - *low) / 31, inverse = scale != 0 ? 1.0f / scale : 0.0f;
  int quants[kInBlock];
  for (int j = 0; j < kInBlock; ++j) quants[j] = static_cast<int>((x[j] - *low) * inverse + 0.5f);
  put_half(scale, block);
  put_half(*low, block + 2);
  put_5_bits(quants, block + 4, block + 8);
}

void pack_q4_k(const float* x, std::byte* block) {
  int quants[kInSuper];
  fit_super_block(x, 15, -1.0f, 20, block, quants);
  for (int j = 0; j < kInSuper; j += 64)
    for (int l = 0; l < 32; ++l) block[16 + j / 2 + l] = to_byte(quants[j + l] | quants[j + l + 32] << 4);
}

void pack_q5_k(const float* x, std::byte* block) {
  int quants[kInSuper];
  fit_super_block(x, 31, -0.5f, 15, block, quants);
  uint8_t high[32] = {};
  for (int j = 0; j < kInSuper; ++j)
    high[j % 32] = static_cast<uint8_t>(high[j % 32] | quants[j] >> 4 << j / 32);
  std::memcpy(block + 16, high, sizeof high);
  for (int j = 0; j < kInSuper; j += 64)
    for (int l = 0; l < 32; ++l)
      block[48 + j / 2 + l] = to_byte((quants[j + l] & 15) | (quants[j + l + 32] & 15) << 4);
}

void pack_q6_k(const float* x, std::byte* block) {
  constexpr int kNum = 16, kBytes = 210;
  int quants[kInSuper];
  float scales[kInSuper / kNum], max_scale = 0, max_magnitude = 0;
  for (int j = 0; j < kInSuper / kNum; ++j) {
    scales[j] = fit_without_offset(x + j * kNum, quants + j * kNum);
    if (std::abs(scales[j]) > max_magnitude) {
      max_magnitude = std::abs(scales[j]);
      max_scale = scales[j];
    }
  }
  if (max_magnitude < kAllZero) {
    std::memset(block, 0, kBytes);
    return;
  }
  const float inverse = -128.0f / max_scale;
  put_half(1 / inverse, block + 208);
  for (int j = 0; j < kInSuper / kNum; ++j) {
    const auto stored = static_cast<int8_t>(std::min(127, nearest(inverse * scales[j])));
    block[192 + j] = static_cast<std::byte>(stored);
    const float scale = get_half(block + 208) * static_cast<float>(stored);
    if (scale == 0) continue;
    for (int l = j * kNum; l < (j + 1) * kNum; ++l)
      quants[l] = std::clamp(nearest(x[l] / scale), -32, 31) + 32;
  }
  for (int half = 0; half < 2; ++half)
    for (int l = 0; l < 32; ++l) {
      const int* four = quants + half * 128 + l;  // 32 apart
      block[half * 64 + l] = to_byte((four[0] & 15) | (four[64] & 15) << 4);
      block[half * 64 + 32 + l] = to_byte((four[32] & 15) | (four[96] & 15) << 4);
      block[128 + half * 32 + l] =
          to_byte(four[0] >> 4 | four[32] >> 4 << 2 | four[64] >> 4 << 4 | four[96] >> 4 << 6);
    }
}

}  // namespace caldera
