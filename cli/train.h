// The command line of `caldera train`, which `caldera launch` reads too.
#pragma once
#include <string>
#include <vector>

#include "cli/command.h"
#include "train/run.h"

namespace caldera {

struct TrainCommand {
  std::string recipe;
  std::vector<std::string> overrides;
  RunOptions run;
  int64_t profile_steps = 0;
};

void add_train_options(CLI::App& command, TrainCommand& options);

}  // namespace caldera
