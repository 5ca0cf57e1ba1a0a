// The binary: a table of subcommands, and the one place where errors become messages and exit codes.
#include <c10/util/Exception.h>
#ifdef CALDERA_CUDA
#include <c10/cuda/CUDAFunctions.h>
#include <dlfcn.h>
#endif
#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "base/error.h"
#include "base/strings.h"
#include "cli/command.h"

namespace caldera {
namespace {

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

// Threads of other programs that want a core now: the median of a few looks. The load average still counts a
// compilation that ended half a minute ago.
int num_others_running() {
  std::array<int, 5> counts{};
  for (int& count : counts) {
    double average = 0;
    int num_running = 1;
    std::ifstream("/proc/loadavg") >> average >> average >> average >> num_running;
    count = num_running - 1;  // this one
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::sort(counts.begin(), counts.end());
  return counts[counts.size() / 2];
}

// OpenMP's threads spin while they wait for each other. That is the fastest where cores are free, and where
// they are not takes them from those waited for, many times over. How to wait is read from the environment
// before main() begins: where other programs keep the cores busy, and nothing else was asked for, this sets it
// and returns true, for the program to start once more.
bool waits_passively_where_cores_are_busy() {
  double load = 0;
  const bool is_told = std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr;
  const auto num_cores = static_cast<double>(::sysconf(_SC_NPROCESSORS_ONLN));
  const int num_threads = ::omp_get_max_threads();
  const auto is_too_much = [&](double others) { return others + num_threads >= num_cores + 0.5; };
  if (is_told || num_threads == 1 || ::getloadavg(&load, 1) != 1 || !is_too_much(load) ||
      !is_too_much(num_others_running()))
    return false;
  ::setenv("OMP_WAIT_POLICY", "passive", 1);
  return true;
}
// What is read from the environment as a library loads is set, and the program starts once more where
// something was.
void restart_where_environment_is_new(char** argv) {
  const bool is_held = hold_libraries(), is_passive = waits_passively_where_cores_are_busy();
  if (!is_held && !is_passive) return;
  restart_program(argv);
  // Busy cores without the restart are slow; a library that is not held would run what it should not.
  CALDERA_CHECK(!is_held, Error, "CALDERA_CPU is set, but the program cannot start itself anew for its libraries (/proc/self/exe)");
}

// LibTorch's CUDA libraries register themselves as they load. Where there is no GPU they would only take memory, and time
// at every start.
void load_gpu_libraries() {
#ifdef CALDERA_CUDA
  if (c10::cuda::device_count() == 0) return;
  CALDERA_CHECK(::dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_GLOBAL) != nullptr, Error,
                "this machine has a GPU, but LibTorch's CUDA libraries do not load: {}", ::dlerror());
#endif
}

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
  load_gpu_libraries();
  CLI::App app("Caldera trains and runs LLaVA-style vision-language models.", "caldera");
  app.set_version_flag("--version", [] { return fmt::format("{}\nprocessor: {}", kVersion, cpu_text()); });
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
    restart_where_environment_is_new(argv);
    return run(argc, argv);
  } catch (const Error& error) {
    return fail(error.what(), error.exit_code());
  } catch (const c10::Error& error) {
    return fail(first_line(error.what_without_backtrace()), 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
}
