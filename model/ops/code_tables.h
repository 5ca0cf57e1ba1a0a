// How the code of an 8-bit state is found (dynamic_map.h), in a form that kernels on a GPU take as well.
#pragma once
#include <cstdint>

namespace caldera {

// A cell holds the numbers that share sign, exponent and seven bits: it spans at most one step of the map.
inline constexpr int kFirstCell = 103 << 7;                     // 2^-24: all below is nearest to zero
inline constexpr int kNumCells = (127 << 7) + 1 - kFirstCell;  // up to 1 itself

// The map's values, what lies between each and the next (infinity after the last), and the code of each cell's lowest
// number; kSigns 2: cells of negative numbers stand behind the others.
template <int kSigns>
struct alignas(16) CodeTable {
  float values[256], middles[256];
  uint8_t lowest[kSigns * kNumCells];
};

// Of AdamW's two moments.
struct CodeTables {
  CodeTable<2> exp_avg;
  CodeTable<1> exp_avg_sq;
};

}  // namespace caldera
