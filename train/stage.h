// What a stage's parts are, by its recipe.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "data/record.h"
#include "model/llava.h"
#include "model/weights/load.h"
#include "train/optimizer.h"
#include "train/recipe.h"

namespace caldera {

// "auto": CUDA where there is a GPU, else the CPU. Throws ConfigError for "cuda" without one,
// DistributedError where there are fewer GPUs than ranks on this machine.
at::Device choose_device(const std::string& device, int local_rank = 0);
// Whether a recipe trains on a GPU. "cuda" may be planned where there is none.
bool trains_on_gpu(const Recipe& recipe);
// Waits until all that was asked of a GPU is done; nothing for a CPU.
void synchronize(at::Device device);
at::ScalarType parse_dtype(const std::string& dtype);  // "float32" or "bfloat16"
// How the model of a stage is built: the recipe's parts, and what earlier stages trained laid over.
BuildSpec build_spec_of(const Recipe& recipe, size_t stage_index);
// Where the recipe's tokenizer is: its own, else the language model's.
std::string tokenizer_of(const Recipe& recipe);
// The part of a recipe that a stage's checkpoints were made under: model, stage and seed, as YAML.
std::string recipe_part(const Recipe& recipe, const StageConfig& stage);
// The tensors that a stage trains, by part, with its learning rates. What never gets a gradient is left out
// (of a tower what lies behind the selected hidden state, its last norm and its head), as torch's AdamW
// passes over it.
std::vector<ParameterGroup> parameter_groups(LlavaModel& model, const StageConfig& stage);
// What is to be said where parts of the stage learn from pictures alone, and no record has one; else "".
std::string trainable_warning(const StageConfig& stage, const std::vector<Record>& records);
// Bytes of the copies that FrozenWeights makes of what is in none of these groups, on the CPU in this dtype; 0 where
// its products need none.
int64_t frozen_copy_bytes(LlavaModel& model, const std::vector<ParameterGroup>& groups, at::ScalarType dtype);

}  // namespace caldera
