// Subcommands of the binary: one small file each, and one line in the table of main.cpp. A subcommand declares its options
// and sets a callback; the callback wires library calls together and throws what they throw. main() alone catches, prints
// "error: MESSAGE" on stderr and turns the error's kind into the exit code.
//
//   // cli/train.cpp
//   void setup_train(CLI::App& command) {
//     auto options = std::make_shared<TrainCommand>();  // shared: the callback outlives this function
//     command.add_option("recipe", options->recipe, "the recipe")->required();
//     command.callback([options] { run(*options); });
//   }
#pragma once
#include <CLI/CLI.hpp>

#include <functional>

namespace caldera {

struct Command {
  const char* name;
  const char* help;  // one line
  void (*setup)(CLI::App& command);
};

void setup_train(CLI::App& command);
void setup_export(CLI::App& command);
void setup_generate(CLI::App& command);
void setup_score(CLI::App& command);
void setup_eval(CLI::App& command);
void setup_data(CLI::App& command);
void setup_recipe(CLI::App& command);

// A progress callback (done, total) that keeps one line on stderr up to date: "WHAT: 120 of 500 (1:02 left)". Where stderr is
// not a terminal, a line every ten seconds instead.
std::function<void(int64_t, int64_t)> progress_line(const std::string& what);

}  // namespace caldera
