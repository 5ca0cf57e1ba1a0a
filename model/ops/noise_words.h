// What noise.h's hash takes, in a form that kernels on a GPU take as well.
#pragma once
#include <cstdint>

namespace caldera {

// Two words from a key; element i hashes i with them (Wellons' lowbias32, the second word between its multiplications).
// The upper bits are the good ones.
struct NoiseWords {
  uint32_t first, second;
  static constexpr uint32_t kMultiply1 = 0x7FEB352Du, kMultiply2 = 0x846CA68Bu;
};

}  // namespace caldera
