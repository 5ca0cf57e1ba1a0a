// Subcommands of the binary: one small file each, and one line in the table of main.cpp. A subcommand
// declares its options and sets a callback; the callback wires library calls together and throws what they
// throw. main() alone catches, prints "error: MESSAGE" on stderr and turns the error's kind into the exit
// code.
//
//   // cli/train.cpp
//   void setup_train(CLI::App& command) {
//     auto options = std::make_shared<TrainCommand>();  // shared: the callback outlives this function
//     command.add_option("recipe", options->recipe, "the recipe")->required();
//     command.callback([options] { run(*options); });
//   }
#pragma once
#include <CLI/CLI.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>

#include "eval/model_session.h"

namespace caldera {

inline constexpr const char* kVersion = "caldera 0.1.0";

struct Command {
  const char* name;
  const char* help;  // one line
  void (*setup)(CLI::App& command);
};

void setup_train(CLI::App& command);
void setup_launch(CLI::App& command);
void setup_export(CLI::App& command);
void setup_model(CLI::App& command);
void setup_generate(CLI::App& command);
void setup_score(CLI::App& command);
void setup_eval(CLI::App& command);
void setup_data(CLI::App& command);
void setup_recipe(CLI::App& command);
void setup_bench(CLI::App& command);
void setup_plan(CLI::App& command);

// Declares --model, --template, --dtype and --device.
void add_session_options(CLI::App& command, SessionOptions& options);

// Progress of one job after another, as one line on stderr that is kept up to date: "loss: 120 of 500, 0:42
// left". Where stderr is not a terminal, a line every ten seconds instead.
std::function<void(const std::string& what, int64_t done, int64_t total)> progress_line();
// The same for a single job.
std::function<void(int64_t done, int64_t total)> progress_line(const std::string& what);

// A folder that will be written as a whole must not exist, be empty, or be an earlier result (`is_ours`):
// writing it replaces what is there. Throws ConfigError.
void check_out_folder(const std::filesystem::path& out, bool is_ours);

}  // namespace caldera
