#include "model/ops/short_rows.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/simd_level.h"

namespace caldera {
namespace {

// The scale of one row, of which `values` are the multiples.
CALDERA_INLINE float round_row(const float* x, int16_t* values, int64_t count) {
  // Without their signs floats are ordered as whole numbers are, those that are not finite last.
  int32_t largest_bits = 0;
  for (int64_t i = 0; i < count; ++i)
    largest_bits = std::max(largest_bits, std::bit_cast<int32_t>(x[i]) & 0x7FFFFFFF);
  const float largest = std::bit_cast<float>(largest_bits);
  if (!std::isfinite(largest)) return std::numeric_limits<float>::quiet_NaN();
  const float scale = std::max(largest, 1e-30f) / 32767, inverse = 1 / scale;
  for (int64_t i = 0; i < count; ++i)
    values[i] = static_cast<int16_t>(static_cast<int32_t>(std::nearbyint(x[i] * inverse)));
  return scale;
}

}  // namespace

ShortRows short_rows(const float* x, int64_t num_rows, int64_t num_inputs) {
  ShortRows rows{std::vector<int16_t>(static_cast<size_t>(num_rows * num_inputs)), {}};
  for (int64_t r = 0; r < num_rows; ++r)
    rows.scale.push_back(
        simd::run<round_row>(x + r * num_inputs, rows.values.data() + r * num_inputs, num_inputs));
  return rows;
}

}  // namespace caldera
