// What a run will take, told before anything starts: memory by category, tokens, steps, and what to change
// where it does not fit. Counts from configurations and texts alone; no weight and no picture is read.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "train/distributed/layout.h"
#include "train/distributed/world.h"
#include "train/recipe.h"

namespace caldera {

// Bytes at the moment of a step when they are the most.
struct MemoryPlan {
  int64_t program = 0;      // code, libraries, and the pictures that the loader keeps
  int64_t weights = 0;      // of all parts, in the dtype of compute
  int64_t packed = 0;       // copies of those that do not train, in the products' order
  int64_t masters = 0;      // what makes float32 masters of bfloat16 weights that train
  int64_t states = 0;       // AdamW's two moments
  int64_t gradients = 0;    // those that exist at that moment, sums over micro-batches included
  int64_t activations = 0;  // kept from forward for backward
  int64_t workspace = 0;    // logits of one chunk, what an operation needs for itself, what checkpoints are written from
  std::string moment;       // "loading the weights", "the head", "backward of block 3 of 32", "saving a checkpoint"
  int64_t total() const { return program + weights + packed + masters + states + gradients + activations + workspace; }
};

// What a stage does about its memory; its numbers are the same either way.
struct MemoryChoices {
  bool packs_frozen = false;      // keeps copies of weights that do not train in the products' order (FrozenWeights)
  int64_t recomputed_halves = 0;  // of the decoder's blocks (recomputed_of)
  int64_t offloaded_inputs = 0;   // of blocks that recompute wholly (is_offloaded)
};

struct StagePlan {
  std::string name;
  int64_t num_samples = 0, steps_per_epoch = 0, num_steps = 0;
  int64_t num_parameters = 0, num_trainable = 0;
  // Of one pass over the data, image tokens included; from a part of the samples where there are many.
  int64_t num_tokens = 0, num_supervised = 0, num_images = 0;
  int64_t shortest = 0, median_length = 0, percentile_95 = 0, longest = 0;  // tokens of a sample
  int64_t num_cut = 0;  // samples longer than model_max_length
  double micro_batches_per_step = 0;
  int64_t largest_micro_batch = 0;  // tokens
  double fill = 0;                  // tokens of micro-batches over max_tokens_per_micro_batch
  double flops_per_step = 0;        // of the matrix products, forward and backward
  int64_t num_blocks = 0;
  bool on_gpu = false;  // whose memory has neither program nor pictures nor checkpoints in it
  MemoryChoices choices;
  // Of how many blocks at least the MLP recomputes, of how many the rest as well, and of how many of these the input
  // waits in host memory.
  int64_t num_recomputed_mlps() const { return std::min(choices.recomputed_halves, num_blocks); }
  int64_t num_recomputed_blocks() const { return choices.recomputed_halves - num_recomputed_mlps(); }
  int64_t num_offloaded_inputs() const { return std::min(choices.offloaded_inputs, num_recomputed_blocks()); }
  std::vector<std::vector<int64_t>> step_lengths;  // tokens of each sample, of the steps looked at
  std::vector<FlatUnit> units;  // how several ranks would share it, without its tensors
  MemoryPlan memory, least_memory;  // with these choices; with all that a budget may choose
};

// Throws what the data's and the models' readers throw. Looks at `max_samples` samples of a stage at most. Of
// one of `num_ranks` ranks, of which `ranks_per_node` share a machine.
StagePlan plan_stage(const Recipe& recipe, const StageConfig& stage, int64_t max_samples = 20000,
                     int64_t num_ranks = 1, int64_t ranks_per_node = 1);
std::vector<StagePlan> plan_recipe(const Recipe& recipe, int64_t max_samples = 20000);

// "2 of 4 blocks recompute their MLP, 1 of them the rest as well".
std::string what_recomputes(const StagePlan& plan);
// Settings that would lower a stage's memory, each with what it brings.
std::vector<std::string> ways_to_take_less(const StageConfig& stage, const StagePlan& plan);

// Without memory.budget_gb: all blocks recompute with gradient_checkpointing, else none. With it, as little speed is given
// up as it takes; says so in the log. All ranks call it, and get the same. Throws ConfigError, naming what helps, where a
// budget cannot be kept.
MemoryChoices choose_memory(const Recipe& recipe, size_t stage_index, World& world);

// Whether copies of so many bytes on each of a machine's ranks are few beside this machine's memory: a quarter at most.
bool copies_fit(int64_t bytes, int64_t ranks_per_node);

}  // namespace caldera
