// Noise that is a hash of a key and an element's index: the same in any order, on any number of threads, and on a GPU
// (cuda/device.cuh's noise_of).
#pragma once
#include <cstdint>

#include "base/rng.h"
#include "model/ops/noise_words.h"
#include "model/ops/simd.h"

namespace caldera {

inline NoiseWords noise_words(uint64_t key) {
  return {static_cast<uint32_t>(mix64(key)), static_cast<uint32_t>(mix64(key) >> 32)};
}

// Of the elements from `index` on.
template <simd::Vector V>
CALDERA_INLINE simd::BitsOf<V> noise_lanes(uint32_t index, const NoiseWords& words) {
  simd::BitsOf<V> hash = simd::lane_numbers<V>() + index;
  hash ^= words.first;
  hash ^= hash >> 16;
  hash *= NoiseWords::kMultiply1;
  hash ^= hash >> 15;
  hash += words.second;
  hash *= NoiseWords::kMultiply2;
  return hash;
}

}  // namespace caldera
