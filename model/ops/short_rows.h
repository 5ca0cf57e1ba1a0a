// Rows rounded to 16 bits a value, to be multiplied by 8-bit weights. Legend: N rows, I inputs.
#pragma once
#include <cstdint>
#include <vector>

namespace caldera {

// Each value is a whole number times its row's scale, 2^-16 of the row's largest magnitude off at the most; a
// row with a value that is not finite has the scale NaN.
struct ShortRows {
  std::vector<int16_t> values;  // [N, I], from -32767 to 32767
  std::vector<float> scale;     // [N]
};
ShortRows short_rows(const float* x, int64_t num_rows, int64_t num_inputs);

}  // namespace caldera
