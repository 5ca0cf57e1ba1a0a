#include "train/distributed/layout.h"

#include <map>
#include <string>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "model/ops/dynamic_map.h"

namespace caldera {
namespace {

// Tensors and parts begin at blocks of 8-bit states, which ranks do not share; so kernels see them aligned,
// too.
constexpr int64_t kAlignment = kQuantizedBlock;
int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// "language_model.model.layers.7.self_attn.q_proj.weight" -> {"language_model.model.layers.", 7}; -1 outside
// of blocks.
std::pair<std::string, int64_t> block_of(const std::string& name) {
  const size_t layers = name.find("layers.");
  if (layers == std::string::npos) return {name.substr(0, name.find('.')), -1};
  const size_t begin = layers + 7, end = name.find('.', begin);
  const std::string number = name.substr(begin, end - begin);
  if (number.empty() || number.size() > 9 || number.find_first_not_of("0123456789") != std::string::npos)
    return {name.substr(0, name.find('.')), -1};
  return {name.substr(0, begin), std::stoll(number)};
}

FlatUnit unit_of(const std::vector<at::Tensor*>& owners, int64_t layer, bool trains) {
  FlatUnit unit{.leaves = {}, .layer = layer, .trains = trains};
  for (at::Tensor* owner : owners) {
    unit.leaves.push_back({owner, unit.length, owner->numel()});
    unit.length += round_up(owner->numel(), kAlignment);
  }
  return unit;
}

}  // namespace

std::vector<FlatUnit> lay_out_units(const std::vector<ParameterGroup>& groups, const NamedTensors& decoder,
                                    bool with_frozen_blocks) {
  std::map<std::tuple<int, int64_t, std::string>, std::vector<at::Tensor*>> by_place;
  std::unordered_set<at::Tensor*> seen;
  for (const ParameterGroup& group : groups) {
    for (const NamedTensor& tensor : group.tensors) {
      if (!seen.insert(tensor.owner).second) continue;
      const auto [block, layer] = block_of(tensor.name);
      const bool is_decoder = group.name == "language_model", is_tower = group.name == "vision_tower";
      const int place = is_decoder ? (layer >= 0 ? 0 : 1) : is_tower ? (layer >= 0 ? 3 : 4) : 2;
      by_place[{place, -layer, block}].push_back(tensor.owner);
    }
  }
  std::vector<FlatUnit> units;
  for (const auto& [place, owners] : by_place)
    units.push_back(unit_of(owners, std::get<0>(place) == 0 ? -std::get<1>(place) : -1, true));
  if (!with_frozen_blocks) return units;
  std::map<int64_t, std::vector<at::Tensor*>> rest;
  for (const NamedTensor& tensor : decoder) {
    const int64_t layer = block_of(tensor.name).second;
    if (layer >= 0 && seen.insert(tensor.owner).second) rest[layer].push_back(tensor.owner);
  }
  for (const auto& [layer, owners] : rest) units.push_back(unit_of(owners, layer, false));
  return units;
}

RankSplit split_ranks(const DistributedConfig& config, int64_t num_ranks, int64_t ranks_per_node) {
  const bool within_node = config.shard_within == "node" && ranks_per_node < num_ranks;
  const int64_t num_shards = config.strategy == "ddp" ? 1 : within_node ? ranks_per_node : num_ranks;
  return {num_shards, num_ranks / num_shards};
}

int64_t padded_length(const FlatUnit& unit, int64_t num_ranks) {
  return round_up(unit.length, kAlignment * num_ranks);
}

}  // namespace caldera
