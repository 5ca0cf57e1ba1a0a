// A whole recipe: its stages in order, each resumed or skipped as its folder says.
#pragma once
#include <filesystem>
#include <functional>
#include <string>

#include "train/recipe.h"
#include "train/trainer.h"

namespace caldera {

struct RunOptions {
  std::string only_stage;  // "" : all
  // "auto": go on from the newest valid checkpoint, skip finished stages. "never": start anew (what is there
  // moves aside). Anything else: a checkpoint's folder, of the first stage that is not finished, whose later
  // checkpoints move aside; the others then go as with "auto". A launcher starts a failed run again with the
  // same options: "never" and a folder are obeyed once in a run, and its further attempts go on from what
  // that made. OUTPUT/resume.json tells them so.
  std::string resume = "auto";
  bool extend = false;     // a stage may go on to another number of steps, whatever that does to its learning rate
  std::string version;     // of this program; all ranks must have the same
  World* world = nullptr;  // none: a single process
};

// Reads and checks all the data of all stages and of the evaluation first (records, pictures, template,
// tokenizer), then trains. A finished stage is skipped where it is what the recipe says, else ConfigError
// says what differs. Throws before any training step what can be known before. All ranks call it alike; where
// one fails, the others throw PeerError with its name and message. Where they have different recipes, data or
// weights, all throw the same error (agreement.h). kStopped: a signal came, also in the last step or while a
// model was built or written; all that was trained is saved.
Outcome run_recipe(const Recipe& recipe, const RunOptions& options, TrainingObserver& observer,
                   const std::function<int()>& stop_requested);

// The recipe with each stage's `dtype: auto` decided, and said in the log: as the stage in its folder was
// begun, where there is one that the options go on with; else what this machine computes fastest. All ranks
// call it alike and get the first's. Throws ConfigError on all of them where their recipes differ.
Recipe choose_dtypes(Recipe recipe, const RunOptions& options = {});

// Seconds spent in the steps of all stages, from their metrics.jsonl.
double train_seconds(const Recipe& recipe);

// Settings of this process that make training on a CPU faster and keep its memory flat: freed large buffers
// stay with the process, instead of coming back as page faults at each step (up to a third of the time), and
// the products' code is kept for the latest shapes alone. Call it before the first product.
void tune_allocator();

}  // namespace caldera
