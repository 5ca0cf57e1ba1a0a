// Which tensors lie together in one flat buffer when several ranks share them, and in which order their
// gradients come. Known before anything runs: sharding works by it, and so does the model of what it costs.
#pragma once
#include <cstdint>
#include <vector>

#include "model/module.h"
#include "train/optimizer.h"
#include "train/recipe.h"

namespace caldera {

struct FlatUnit {
  struct Leaf {
    at::Tensor* owner;
    int64_t offset, numel;  // in the flat buffer, in elements
  };
  std::vector<Leaf> leaves;
  int64_t layer = -1;  // of the decoder's block; -1: none
  bool trains = true;
  int64_t length = 0;  // elements, the gaps of alignment included
};

// The units that train, in the order in which the backward pass meets them: the decoder's blocks, the last
// one ahead, what is left of the decoder (its embedding comes late), the projector, the tower. With
// `with_frozen_blocks`, then what does not train of the decoder's blocks, by layer. `decoder`: all tensors of
// the language model.
std::vector<FlatUnit> lay_out_units(const std::vector<ParameterGroup>& groups, const NamedTensors& decoder,
                                    bool with_frozen_blocks);
// S ranks that share x R that hold the same part (see sharding.h): rank r holds part r % S, and is the r /
// S-th that does.
struct RankSplit {
  int64_t num_shards = 1, num_replicas = 1;
};
RankSplit split_ranks(const DistributedConfig& config, int64_t num_ranks, int64_t ranks_per_node);
// Elements of a unit's buffer that `num_ranks` can share in equal, aligned parts.
int64_t padded_length(const FlatUnit& unit, int64_t num_ranks);

}  // namespace caldera
