// The memory that a stage takes, from its model's shapes: what plans say, and what a budget decides by.
#pragma once
#include <cstdint>

#include "model/llava.h"
#include "train/plan.h"

namespace caldera {

// A stage's model with storage that nobody touches, and what its memory depends on. Legend: D width, F MLP
// width, H query heads, G key/value heads, K head width, V vocabulary, L blocks.
struct PlannedModel {
  LlavaModel model;
  int64_t D = 0, F = 0, H = 0, G = 0, K = 0, V = 0, L = 0;
  int64_t num_parameters = 0, num_trainable = 0;
  int64_t block_parameters = 0, block_trainable = 0;  // of one block; the former without weights in 4 bits
  int64_t nf4_parameters = 0, nf4_bytes = 0;          // of weights in 4 bits
  int64_t nf4_matrix = 0;                             // elements of the largest of them
  int64_t state_bytes = 0;                            // of both moments
  int64_t packed_bytes = 0;                           // of copies of what does not train (FrozenWeights)
  int64_t lora_r = 0;                                 // rank of adapters
  int64_t file_bytes = 0;                             // of the decoder's weights
  int64_t tower_width = 0, tower_kept = 0;  // elements that a trained tower keeps for backward, a patch
  int64_t projector_kept = 0;               // the same of the projector, beside its input
  bool head_trains = false, language_trains = false, tower_trains = false, projector_trains = false,
       embedding_trains = false, is_tied = false, lora = false, norms_heads = false;
};
PlannedModel plan_model(const Recipe& recipe, const StageConfig& stage);

// At the worst moment; of the GPU's memory with `on_gpu`, else of the process's, which takes `program` bytes in any
// case. `ranks`: how many share what the strategy shares, and how many sum their gradients.
MemoryPlan plan_memory(const PlannedModel& model, const Recipe& recipe, const StageConfig& stage,
                       const StagePlan& numbers, bool on_gpu, int64_t program, const MemoryChoices& choices,
                       const RankSplit& ranks);

}  // namespace caldera
