// AdamW in less memory: moments in 8 bits, weights without a float32 master. One pass over memory.
#pragma once

#include <cstdint>

#include "base/aten.h"
#include "model/ops/adamw.h"

namespace caldera {

// A moment of Adam: float32 values, or codes of 8 bits (dynamic_map.h; signed for exp_avg, unsigned for
// exp_avg_sq).
struct Moment {
  at::Tensor values;  // float32 or uint8
  at::Tensor scale;   // of the codes' blocks; undefined where the values are float32
};
// Zeros for `count` elements of the given shape and device.
Moment zero_moment(const at::Tensor& like, bool is_8bit);

// The noise that decides which way a weight is rounded: of element i of the call, a hash of (key, first + i).
// Its 16 bits are added to the float32 value's lower half before that is cut off, so a value is rounded to
// either neighbour with the probability of its nearness, and its expectation is the value itself ("stochastic
// rounding", Gupta et al., arXiv 1502.02551).
struct RoundingNoise {
  uint64_t key = 0;
  int64_t first = 0;  // counted modulo 2^32
};
// Float32 values -> bfloat16, on any device.
at::Tensor round_stochastically(const at::Tensor& values, const RoundingNoise& noise);

// One update, as adamw_update, of moments in either form. Where a bfloat16 weight is all there is, it is read,
// updated in float32 and rounded by the noise. The update is computed from the moments before they are rounded
// to 8 bits.
void adamw_update_compact(const Master& master, const Moment& exp_avg, const Moment& exp_avg_sq,
                          const at::Tensor& gradient, const AdamWStep& step, const RoundingNoise& noise);

}  // namespace caldera
