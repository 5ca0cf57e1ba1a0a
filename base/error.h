// Errors: one hierarchy, each kind with its own exit code. A message says what went wrong, where (file, line, record,
// tensor), what was expected against what was got, and what to do. Below cli/ nothing exits or prints: it throws.
#pragma once
#include <fmt/format.h>

#include <stdexcept>
#include <string>

namespace caldera {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, int exit_code = 1)
      : std::runtime_error(message), exit_code_(exit_code) {}
  // Exit code of the process: 2 usage or recipe, 3 data, 4 checkpoint or weights, 5 distributed, 1 anything else.
  int exit_code() const { return exit_code_; }

 private:
  int exit_code_;
};

// A recipe or a command line that cannot be obeyed. The message starts with "file:line:column:" where there is a file.
struct ConfigError : Error {
  explicit ConfigError(const std::string& message) : Error(message, 2) {}
};
// A record, picture or data file that cannot be used. The message names the file and the record.
struct DataError : Error {
  explicit DataError(const std::string& message) : Error(message, 3) {}
};
// A weights file, model folder or checkpoint that cannot be used. The message names the file and the tensor.
struct CheckpointError : Error {
  explicit CheckpointError(const std::string& message) : Error(message, 4) {}
};
// A rank, its peers, or their process group. The message names the rank.
struct DistributedError : Error {
  explicit DistributedError(const std::string& message) : Error(message, 5) {}
};

// Our own bug, never a user's fault: names the place in the source.
[[noreturn]] void assert_failed(const char* expression, const char* file, int line);

}  // namespace caldera

// CALDERA_CHECK(condition, DataError, "{}: expected {}, got {}", ...): throws the error unless the condition holds.
#define CALDERA_CHECK(condition, ErrorType, ...)                             \
  do {                                                                       \
    if (!(condition)) throw ::caldera::ErrorType(::fmt::format(__VA_ARGS__)); \
  } while (false)

// CALDERA_ASSERT(condition): an invariant of ours; unreachable from any input.
#define CALDERA_ASSERT(condition)                                                 \
  do {                                                                            \
    if (!(condition)) ::caldera::assert_failed(#condition, __FILE__, __LINE__); \
  } while (false)
