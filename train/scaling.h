// A step on many GPUs, on paper: what each rank sends, how long it computes, waits and updates. Counts are
// exact (a test holds them against what real ranks send); times are a model whose assumptions stand in Gpu
// and Cluster.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "train/plan.h"
#include "train/recipe.h"

namespace caldera {

// What a vendor's data sheet says of a GPU, and of what connects it.
struct Gpu {
  const char* name;
  double peak_flops;           // bfloat16 matrix products, dense, FLOP/s
  double memory_bytes_per_s;   // to it
  double node_bytes_per_s;     // to the GPUs of its machine, one direction
  double network_bytes_per_s;  // to other machines, its share of the machine's network, one direction
};
// Throws ConfigError naming the known ones.
const Gpu& find_gpu(const std::string& name);

struct Cluster {
  Gpu gpu;
  int64_t num_nodes = 1, gpus_per_node = 8;
  double utilization = 0.5;  // share of peak_flops that a step's products reach
  double link_share = 0.8;   // share of a link's rate that a collective of large buffers reaches
  double hop_s = 3e-6;       // of each of a ring's hops
};

struct ScalingPoint {
  int64_t num_ranks = 1;
  double samples_per_rank = 0;
  double imbalance = 1;   // tokens of the rank that has the most, over the mean
  double num_rounds = 1;  // micro-batches of that rank
  double compute_s = 0;   // of the rank that has the most
  double update_s = 0;    // AdamW
  double exposed_s = 0;   // of the communication, what nothing hides
  double sent_bytes = 0;  // by a rank, through its links
  // What it hands to collectives, as World counts it (without evaluation and checkpoints), in a step with the
  // mean number of micro-batches, rounded.
  int64_t num_collectives = 0, num_bytes = 0;
  double memory_bytes = 0;  // of a rank: weights, masters, states, gradients, activations, workspace
  double step_s = 0, tokens_per_second = 0;
  double efficiency = 0;  // time of the products, shared evenly, over the step's
};
// Looks at `max_samples` samples at most, as plan_stage does; throws what it throws.
ScalingPoint scale(Recipe recipe, const StageConfig& stage, const Cluster& cluster,
                   int64_t max_samples = 20000);

}  // namespace caldera
