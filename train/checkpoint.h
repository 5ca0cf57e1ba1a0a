// Checkpoints of a stage: written as a whole or not at all, verified before use.
//
//   STAGE/checkpoints/step-00000100/{model.safetensors     float32 masters of what trains, HF names
//                                    optimizer.safetensors exp_avg.NAME, exp_avg_sq.NAME
//                                    trainer_state.json    step, seed and the stage's recipe
//                                    caldera.json          how to build the model around it (BuildSpec, ModelCard)
//                                    manifest.json}        size and XXH3-128 of each of the above
//   STAGE/latest                                           the newest step folder's name
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "base/json.h"
#include "train/optimizer.h"

namespace caldera {

struct CheckpointState {
  int64_t step = 0;  // steps done
  uint64_t seed = 0;
  std::string recipe;  // recipe_part() of the stage: a run goes on only with what it began with
  Json caldera;        // {"build": BuildSpec, "card": ModelCard}
};

// Writes step-N below stage_folder/checkpoints, then "latest", then removes all but the newest `save_total_limit` (0: keeps
// all). Throws Error naming the path where the disk does not take it; older checkpoints are then untouched.
void write_checkpoint(const std::filesystem::path& stage_folder, const CheckpointState& state, const AdamW& optimizer,
                      int64_t save_total_limit);

// The newest checkpoint of a stage whose files all match their manifest; a broken one is named in a warning and passed over.
std::optional<std::filesystem::path> newest_checkpoint(const std::filesystem::path& stage_folder);
// Throws CheckpointError naming the first file that does not match the manifest.
void verify_checkpoint(const std::filesystem::path& folder);

CheckpointState read_checkpoint_state(const std::filesystem::path& folder);
// Copies masters and moments into the optimizer and rounds the weights from them. Throws CheckpointError for a missing tensor
// or a shape that differs.
void load_checkpoint(const std::filesystem::path& folder, AdamW& optimizer);

}  // namespace caldera
