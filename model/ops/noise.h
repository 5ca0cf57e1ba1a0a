// Noise for CPU kernels that is a hash of a key and an element's index: the same in any order, on any number of threads,
// and on a GPU (device.cuh's noise_of).
#pragma once
#include <cstdint>

#include "base/rng.h"
#include "model/ops/simd.h"

namespace caldera {

// Two words of 32 bits from the key; element i hashes i with them (Wellons' lowbias32, the second word between its
// multiplications). The upper bits are the good ones.
struct NoiseWords {
  explicit NoiseWords(uint64_t key)
      : first(static_cast<uint32_t>(mix64(key))), second(static_cast<uint32_t>(mix64(key) >> 32)) {}
  uint32_t first, second;
};
inline constexpr uint32_t kNoiseMultiply1 = 0x7FEB352Du, kNoiseMultiply2 = 0x846CA68Bu;

// Of the elements from `index` on.
CALDERA_INLINE simd::Bits noise_lanes(uint32_t index, const NoiseWords& words) {
  simd::Bits hash;
  for (int64_t lane = 0; lane < simd::kLanes; ++lane) hash[lane] = index + static_cast<uint32_t>(lane);
  hash ^= words.first;
  hash ^= hash >> 16;
  hash *= kNoiseMultiply1;
  hash ^= hash >> 15;
  hash += words.second;
  hash *= kNoiseMultiply2;
  return hash;
}

}  // namespace caldera
