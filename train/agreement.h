// What all ranks of a run must have alike, compared before any step: a recipe that was edited on one machine
// only, older data or other weights there would train something that nobody asked for, without a word. Every
// rank compares all with the first, and where something differs all throw the same error, which names the
// keys, the values and the ranks. A single process has nothing to compare.
#pragma once
#include <filesystem>
#include <optional>
#include <string>

#include "base/json.h"
#include "model/llava.h"
#include "train/distributed/world.h"
#include "train/recipe.h"

namespace caldera {

struct RunOptions;
struct StageData;

// Of errors that all ranks throw at the same place, in the same words: none has to tell the others
// (World::fail).
struct ThrownByAll {
  virtual ~ThrownByAll() = default;
};
template <class ErrorType>
struct Disagreement : ErrorType, ThrownByAll {
  using ErrorType::ErrorType;
};

// `mine`: texts by key. What the ranks do not have alike, the same text on all of them, as "KEY VERB 1 on
// rank 0 (node0) and 2 on rank 3 (node1)"; at most five keys, then how many more. "" where all is alike. All
// ranks call it.
std::string differences(World& world, const std::string& verb, const Json& mine);

// The program's version, the options and the whole recipe. Where the model's parts, the data and pictures lie
// may differ between machines, though not whether they are given: what is there is compared below. `output`
// must be the same: all ranks write their parts of a checkpoint there. Throws ConfigError.
void agree_on_recipe(World& world, const Recipe& recipe, const RunOptions& options);

// What a stage learns and is validated on: the number of records and a checksum of what was read of them (not
// of the file: how it is laid out changes nothing); then how the tokenizer splits the first hundred. Pictures
// are not compared: each rank has looked whether its own are there. Throws DataError, or CheckpointError for
// the tokenizer.
void agree_on_data(World& world, const StageConfig& stage, const StageData& data);

// Checksums of each component's tensors as they were built (float32 on the CPU: one pass over memory), and of
// the manifest of the checkpoint that will be loaded. Throws CheckpointError.
void agree_on_weights(World& world, LlavaModel& model,
                      const std::optional<std::filesystem::path>& checkpoint);

}  // namespace caldera
