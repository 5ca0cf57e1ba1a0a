// Softmax attention of single queries on the CPU, as a step of generation has them.
#pragma once
#include <vector>

#include "model/ops/attention_cpu.h"

namespace caldera {

// out[i] [1, H, K] = softmax(q k^T / sqrt(K)) v for samples of one query each, all rows dense: keys and
// values are read where they lie, each once for all the query heads that share it.
void attend_one_query(const std::vector<AttentionSample>& samples,
                            const std::vector<AttentionRows>& out);

}  // namespace caldera
