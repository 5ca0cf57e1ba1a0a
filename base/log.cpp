#include "base/log.h"

#include <cstdio>
#include <mutex>
#include <utility>

namespace caldera {
namespace {

std::mutex& sink_mutex() {
  static std::mutex mutex;
  return mutex;
}

LogSink& sink() {
  static LogSink current = [](LogLevel level, const std::string& line) {
    fmt::print(stderr, "{}{}\n", level == LogLevel::kWarning ? "warning: " : "", line);
  };
  return current;
}

}  // namespace

LogSink set_log_sink(LogSink replacement) {
  const std::lock_guard lock(sink_mutex());
  return std::exchange(sink(), std::move(replacement));
}

void log_line(LogLevel level, const std::string& line) {
  const std::lock_guard lock(sink_mutex());
  sink()(level, line);
}

}  // namespace caldera
