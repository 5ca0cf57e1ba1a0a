#include "train/scaling.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/strings.h"
#include "data/dataset.h"

// NVIDIA's data sheets: SXM modules, NVLink 3, 4 and 5; one network card a GPU: 200, 400 and 800 Gb/s.
namespace caldera {
namespace {

constexpr Gpu kGpus[] = {{"a100", 312e12, 2.04e12, 300e9, 25e9},
                         {"h100", 989e12, 3.35e12, 450e9, 50e9},
                         {"h200", 989e12, 4.8e12, 450e9, 50e9},
                         {"b200", 2250e12, 8e12, 900e9, 100e9}};

// Bytes that AdamW moves for an element: gradient, weight with its remainder, and both moments read, the last
// four written.
constexpr double kUpdateBytes = 4 * 4 + 3 * 4;

enum class Kind { kSum, kReduceScatter, kAllGather };
// When a collective runs: beside the passes, beside the next step's forward pass, either of which may hide it, or between
// the update and that pass.
enum class When { kMeanwhile, kNextForward, kAfterwards };

struct Collective {
  Kind kind;
  When when;
  bool between_machines;  // its ring crosses the network
  int64_t num_ranks;      // in its ring
  int64_t num_bytes;      // of the whole buffer
  int64_t num_repeats = 1;
};

// What a step does, as train/distributed/sharding does it.
std::vector<Collective> collectives_of_step(const StagePlan& plan, const StageConfig& stage,
                                            const DistributedConfig& config, int64_t num_ranks,
                                            int64_t ranks_per_node, int64_t num_rounds) {
  const auto [num_shards, num_replicas] = split_ranks(config, num_ranks, ranks_per_node);
  const int64_t gradient_bytes = config.reduce_dtype == "bfloat16" ? 2 : 4;
  const int64_t weight_bytes = stage.dtype == "float32" ? 4 : 2;
  const bool frees = config.strategy == "zero3";
  const int64_t reductions = frees || config.strategy == "zero2" ? num_rounds : 1;
  const bool several_nodes = num_ranks > ranks_per_node, shards_cross = num_shards > ranks_per_node;
  std::vector<Collective> result;
  for (const FlatUnit& unit : plan.units) {
    const int64_t length = padded_length(unit, num_ranks);
    const bool is_freed = frees && unit.layer >= 0;
    const auto among_sharers = [&](Kind kind, When when, int64_t bytes, int64_t repeats) {
      if (num_shards > 1) result.push_back({kind, when, shards_cross, num_shards, length * bytes, repeats});
    };
    if (unit.trains) {
      among_sharers(Kind::kReduceScatter, When::kMeanwhile, gradient_bytes, reductions);
      if (num_replicas > 1)
        result.push_back({Kind::kSum, When::kMeanwhile, several_nodes, num_replicas,
                          length / num_shards * gradient_bytes});
    }
    if (is_freed) {
      among_sharers(Kind::kAllGather, When::kMeanwhile, weight_bytes, 2 * num_rounds);  // in both passes
    } else if (unit.trains) {
      among_sharers(Kind::kAllGather, unit.layer >= 0 ? When::kNextForward : When::kAfterwards, weight_bytes, 1);
    }
  }
  return result;
}

// Seconds of a ring among `num_ranks`, the slowest link of which has `bytes_per_s`; and what a rank sends.
struct Ring {
  double seconds = 0, sent_bytes = 0;
};
Ring ring(const Collective& of, const Cluster& cluster) {
  const double link = cluster.link_share *
                      (of.between_machines ? cluster.gpu.network_bytes_per_s : cluster.gpu.node_bytes_per_s);
  const double passes = of.kind == Kind::kSum ? 2 : 1, hops = static_cast<double>(of.num_ranks - 1);
  const double sent = passes * static_cast<double>(of.num_bytes) * hops / static_cast<double>(of.num_ranks);
  return {sent / link + passes * hops * cluster.hop_s, sent};
}

// Tokens and micro-batches of the rank that has the most, over the recipe's first steps.
struct Load {
  double imbalance = 1, num_rounds = 1;
};
Load deal(const StagePlan& plan, const StageConfig& stage, int64_t num_ranks) {
  double most = 0, mean = 0, rounds = 0;
  for (const std::vector<int64_t>& lengths : plan.step_lengths) {
    int64_t tokens_of_most = 0, rounds_of_most = 1;
    for (const std::vector<int64_t>& samples : deal_to_ranks(lengths, static_cast<int>(num_ranks))) {
      std::vector<int64_t> mine;
      for (const int64_t i : samples) mine.push_back(lengths[static_cast<size_t>(i)]);
      tokens_of_most = std::max(tokens_of_most, std::accumulate(mine.begin(), mine.end(), int64_t{0}));
      rounds_of_most =
          std::max(rounds_of_most, std::ssize(plan_micro_batches(mine, stage.max_tokens_per_micro_batch)));
    }
    most += static_cast<double>(tokens_of_most);
    mean += static_cast<double>(std::accumulate(lengths.begin(), lengths.end(), int64_t{0})) /
            static_cast<double>(num_ranks);
    rounds += static_cast<double>(rounds_of_most);
  }
  return {most / mean, rounds / static_cast<double>(plan.step_lengths.size())};
}

}  // namespace

const Gpu& find_gpu(const std::string& name) {
  std::vector<std::string> names;
  for (const Gpu& gpu : kGpus) {
    if (name == gpu.name) return gpu;
    names.emplace_back(gpu.name);
  }
  throw ConfigError(fmt::format("--gpu {}: expected one of {}", name, join(names, ", ")));
}

ScalingPoint scale(Recipe recipe, const StageConfig& stage, const Cluster& cluster, int64_t max_samples) {
  recipe.device = "cuda";
  const DistributedConfig& config = recipe.distributed;
  ScalingPoint point;
  point.num_ranks = cluster.num_nodes * cluster.gpus_per_node;
  const auto ranks = static_cast<double>(point.num_ranks);
  const int64_t num_sharing = split_ranks(config, point.num_ranks, cluster.gpus_per_node).num_shards;
  const StagePlan plan = plan_stage(recipe, stage, max_samples, point.num_ranks, cluster.gpus_per_node);
  const Load load = deal(plan, stage, point.num_ranks);
  double samples = 0, tokens = 0;
  for (const std::vector<int64_t>& lengths : plan.step_lengths) {
    samples += static_cast<double>(lengths.size());
    tokens += static_cast<double>(std::accumulate(lengths.begin(), lengths.end(), int64_t{0}));
  }
  const auto num_steps = static_cast<double>(plan.step_lengths.size());
  point.samples_per_rank = samples / num_steps / ranks;
  point.imbalance = load.imbalance;
  point.num_rounds = load.num_rounds;
  const double ideal_s = plan.flops_per_step / ranks / (cluster.gpu.peak_flops * cluster.utilization);
  point.compute_s = ideal_s * load.imbalance;
  point.update_s = kUpdateBytes * static_cast<double>(plan.num_trainable) / static_cast<double>(num_sharing) /
                   cluster.gpu.memory_bytes_per_s;
  point.memory_bytes = static_cast<double>(plan.memory.total());

  if (point.num_ranks > 1) {
    const auto rounds = static_cast<int64_t>(std::lround(load.num_rounds));
    // The step's loss, norm, signals and times (step_report.h), and then the rest.
    point.num_collectives = 1;
    point.num_bytes = 8 * (2 + 3 * point.num_ranks);
    double hidden_s = 0, next_s = 0, afterwards_s = 0;
    for (const Collective& collective :
         collectives_of_step(plan, stage, config, point.num_ranks, cluster.gpus_per_node, rounds)) {
      const Ring one = ring(collective, cluster);
      const auto repeats = static_cast<double>(collective.num_repeats);
      (collective.when == When::kMeanwhile     ? hidden_s
       : collective.when == When::kNextForward ? next_s
                                               : afterwards_s) += repeats * one.seconds;
      point.sent_bytes += repeats * one.sent_bytes;
      point.num_collectives += collective.num_repeats;
      point.num_bytes += collective.num_bytes * collective.num_repeats;
    }
    // Reductions run beside the backward pass of the micro-batch they belong to, gathers of blocks beside
    // both passes; a backward pass is two thirds of the work. What belongs to the last unit has nothing left
    // to hide behind. Updated weights of blocks come beside the first forward pass of the next step.
    const bool every_round = config.strategy == "zero2" || config.strategy == "zero3";
    const double window = point.compute_s * (config.strategy == "zero3" ? 1.0 : 2.0 / 3) /
                          (every_round ? 1.0 : load.num_rounds);
    const double last_share = 1.0 / static_cast<double>(std::max<size_t>(plan.units.size(), 1));
    const double forward_s = point.compute_s / 3 / load.num_rounds;
    point.exposed_s = std::max(hidden_s - window, hidden_s * last_share) + std::max(next_s - forward_s, next_s * last_share) +
                      afterwards_s + 2 * (ranks - 1) * cluster.hop_s;
  }
  point.step_s = point.compute_s + point.update_s + point.exposed_s;
  point.tokens_per_second = tokens / num_steps / point.step_s;
  point.efficiency = ideal_s / point.step_s;
  return point;
}

}  // namespace caldera
