// Checkpoints of a stage: written as a whole or not at all, verified before use.
//
// clang-format off
//   STAGE/checkpoints/step-00000100/
//     model.safetensors      float32 masters of what trains, whole, HF names
//     optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME; where ranks share the state, a file for each part
//                            instead, optimizer-00001-of-00004.safetensors, with NAME@BEGIN
//     trainer_state.json     step, seed, number of samples, validation loss and the stage's recipe
//     caldera.json           how to build the model around it (BuildSpec, ModelCard)
//     manifest.json          size and XXH3-128 of each of the above
//   STAGE/latest, STAGE/best   names of the newest step's folder, and of the one with the lowest validation loss
//   STAGE/checkpoints.old-1/   checkpoints of later steps, from before the run went back to an earlier one
// clang-format on
//
// Any number of ranks, under any strategy, goes on from any of them.
#pragma once
#include <cstdint>
#include <filesystem>
#include <future>
#include <memory>
#include <optional>
#include <string>

#include "base/json.h"
#include "train/distributed/world.h"
#include "train/optimizer.h"
#include "train/snapshot.h"

namespace caldera {

struct CheckpointState {
  int64_t step = 0;  // steps done
  std::optional<int64_t> num_updates;  // of the weights, fewer where steps had nothing to learn; older checkpoints: `step`
  uint64_t seed = 0;
  std::optional<int64_t> num_samples;  // of the data, whose order depends on it; older checkpoints do not say
  std::optional<double> eval_loss;  // validation loss after that step, where it was measured
  std::string recipe;               // recipe_part() of the stage: a run goes on only with what it began with
  Json caldera;                     // {"build": BuildSpec, "card": ModelCard}
};

// What one rank writes of a checkpoint.
struct CheckpointShare {
  CheckpointState state;
  StateList masters, moments;  // masters: the first rank's alone
  bool masters_are_copies = false;  // in host memory, and no update changes them
  int part = 0, num_parts = 1;  // which part of the moments this is; -1: another rank writes the same
};

// Which checkpoints stay: the newest `save_total_limit` (0: all of them), and where told so the best.
struct KeptCheckpoints {
  int64_t save_total_limit = 0;
  bool save_best = false;
};

// Writes step-N below stage_folder/checkpoints, then "latest" and "best", and removes the oldest that are not
// to be kept. There must be none of later steps (set_later_checkpoints_aside()). All ranks call it; when it
// returns, the checkpoint stands. Throws Error naming the path where the disk does not take it, on every
// rank; older checkpoints are then untouched.
void write_checkpoint(const std::filesystem::path& stage_folder, const CheckpointShare& share,
                      const KeptCheckpoints& kept, World& world = World::alone());

// Writes checkpoints, in the background where told so: the same bytes.
class CheckpointWriter {
 public:
  CheckpointWriter(std::filesystem::path stage_folder, const KeptCheckpoints& kept, bool in_background,
                   World& world);
  ~CheckpointWriter();  // waits for what is being written
  // Begins a save, after the one before has ended. In the background the state is read where it lies, tensor
  // by tensor: it must not change before_update().
  void save(CheckpointShare share);
  // Copies what is not written yet, so that the state may change; `step` is the one under way.
  void before_update(int64_t step);
  // Waits for what is being written, throws what it threw, and returns its folder if there is one that was
  // not returned before.
  std::optional<std::filesystem::path> finish();
  // The same where it has ended already.
  std::optional<std::filesystem::path> finished();

 private:
  std::filesystem::path stage_folder_;
  KeptCheckpoints kept_;
  bool in_background_;
  World& world_;
  std::unique_ptr<Snapshot> masters_, moments_;  // of what is being written
  std::future<std::filesystem::path> writing_;
};

// The newest checkpoint of a stage whose files all match their manifest; a broken one is named in a warning
// and passed over.
std::optional<std::filesystem::path> newest_checkpoint(const std::filesystem::path& stage_folder);
// The one of the lowest validation loss, of equal ones the earliest; none where none has a validation loss.
std::optional<std::filesystem::path> best_checkpoint(const std::filesystem::path& stage_folder);
// Before a stage goes on from `checkpoint`, in its own folder or elsewhere (none: it begins): its checkpoints
// of later steps, broken ones too, would be taken for the newest and push out what is written from now on.
// They are moved, whole, to STAGE/checkpoints.old-K, and all of them where `checkpoint` is none of them:
// nothing is lost, and the log says so. "latest" and "best" then name what is left. One process calls it.
// Throws std::filesystem_error or Error.
void set_later_checkpoints_aside(const std::filesystem::path& stage_folder,
                                 const std::optional<std::filesystem::path>& checkpoint);
// Throws CheckpointError naming the first file that does not match the manifest.
void verify_checkpoint(const std::filesystem::path& folder);

CheckpointState read_checkpoint_state(const std::filesystem::path& folder);
// Copies masters and moments, or what this rank owns of them, into the optimizer and rounds the weights from
// them. Throws CheckpointError for a missing tensor, part of a tensor, or a shape that differs.
void load_checkpoint(const std::filesystem::path& folder, AdamW& optimizer);

}  // namespace caldera
