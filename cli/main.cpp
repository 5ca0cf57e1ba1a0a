// The binary: a table of subcommands, and the one place where errors become messages and exit codes.
#include <c10/util/Exception.h>

#include <array>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/strings.h"
#include "cli/command.h"

namespace caldera {
namespace {

constexpr const char* kVersion = "caldera 0.1.0";

constexpr std::array kCommands = {
    Command{"train", "train the stages of a recipe", setup_train},
    Command{"launch", "train with several processes", setup_launch},
    Command{"recipe", "check a recipe, or print what one may say", setup_recipe},
    Command{"plan", "memory, time and data of a recipe, before anything starts", setup_plan},
    Command{"data", "check, preview or make data", setup_data},
    Command{"generate", "answer a prompt about pictures, or a file of them", setup_generate},
    Command{"score", "likelihood of each sample of a data file", setup_score},
    Command{"eval", "measure a model on held-out data", setup_eval},
    Command{"model", "tell what a model folder or file holds", setup_model},
    Command{"export", "write a model for other programs to load", setup_export},
    Command{"bench", "a step of work for each line on stdin, to be timed beside others", setup_bench},
};

int fail(const std::string& message, int exit_code) {
  fmt::print(stderr, "error: {}\n", message);
  return exit_code;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

// CLI11 speaks of "arguments" where a word in the command's place is meant.
void check_command(int argc, char** argv) {
  if (argc < 2 || argv[1][0] == '-') return;
  std::vector<std::string> names;
  for (const Command& command : kCommands) names.push_back(command.name);
  CALDERA_CHECK(std::find(names.begin(), names.end(), argv[1]) != names.end(), ConfigError,
                "unknown command \"{}\"{}", argv[1], suggestion(argv[1], names));
}

int run(int argc, char** argv) {
  CLI::App app("Caldera trains and runs LLaVA-style vision-language models.", "caldera");
  app.set_version_flag("--version", kVersion);
  app.require_subcommand(1);
  for (const Command& command : kCommands) command.setup(*app.add_subcommand(command.name, command.help));
  try {
    check_command(argc, argv);
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
    return fail(fmt::format("{} (see {} --help)", error.what(),
                            argc > 1 ? fmt::format("caldera {}", argv[1]) : "caldera"),
                2);
  }
  // Results that did not reach their reader are no success.
  CALDERA_CHECK(std::fflush(stdout) == 0 && std::ferror(stdout) == 0, Error,
                "cannot write to standard output");
  return 0;
}

}  // namespace
}  // namespace caldera

int main(int argc, char** argv) {
  using namespace caldera;
  try {
    return run(argc, argv);
  } catch (const Error& error) {
    return fail(error.what(), error.exit_code());
  } catch (const c10::Error& error) {
    return fail(first_line(error.what_without_backtrace()), 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
}
