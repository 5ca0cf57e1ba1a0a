#include "cli/command.h"

#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <memory>

#include "base/error.h"
#include "base/files.h"
#include "base/strings.h"

namespace caldera {

void add_session_options(CLI::App& command, SessionOptions& options) {
  command
      .add_option("--model", options.model,
                  "a run's folder, a checkpoint, an exported or an adapter's folder")
      ->required();
  command.add_option("--model-base", options.model_base,
                     "the model that an adapter's folder belongs to (default: the one it names)");
  command.add_option("--template", options.conversation_template,
                     "conversation template (default: the model's own, else its tokenizer's)");
  command
      .add_option(
          "--dtype", options.dtype,
          "float32, bfloat16 or (decoder's weights, CPU) int8; auto: float32 on the CPU, bfloat16 on CUDA")
      ->capture_default_str();
  command.add_option("--device", options.device, "cpu or cuda; auto: CUDA where there is one")
      ->capture_default_str();
}

std::function<void(const std::string&, int64_t, int64_t)> progress_line() {
  using Clock = std::chrono::steady_clock;
  struct State {
    std::string what;
    Clock::time_point begin, shown;
  };
  const bool is_terminal = ::isatty(STDERR_FILENO) != 0;
  return
      [state = std::make_shared<State>(), is_terminal](const std::string& what, int64_t done, int64_t total) {
        const Clock::time_point now = Clock::now();
        if (what != state->what) *state = {what, now, now};
        const double since_shown = std::chrono::duration<double>(now - state->shown).count();
        const bool is_last = done >= total;
        if (!is_last && since_shown < (is_terminal ? 0.2 : 10.0)) return;
        state->shown = now;
        const double elapsed = std::chrono::duration<double>(now - state->begin).count();
        const double left =
            elapsed * static_cast<double>(total - done) / static_cast<double>(std::max<int64_t>(done, 1));
        const std::string time = is_last ? human_duration(elapsed) : human_duration(left) + " left";
        fmt::print(stderr, "{}{}: {} of {}, {}{}", is_terminal ? "\r\033[K" : "", what, done, total, time,
                   is_last || !is_terminal ? "\n" : "");
        std::fflush(stderr);
      };
}

std::function<void(int64_t, int64_t)> progress_line(const std::string& what) {
  return [what, line = progress_line()](int64_t done, int64_t total) { line(what, done, total); };
}

void check_out_folder(const fs::path& out, bool is_ours) {
  CALDERA_CHECK(!fs::exists(out) || fs::is_directory(out), ConfigError, "--out {}: is a file; name a folder",
                out.string());
  CALDERA_CHECK(!fs::exists(out) || fs::is_empty(out) || is_ours, ConfigError,
                "--out {}: holds files that this command did not write and would replace; name a new folder",
                out.string());
}

}  // namespace caldera
