// Log lines, for people: "note", "warning". They go where the program's front end says (stderr unless told otherwise);
// library code never writes to a stream itself.
#pragma once
#include <fmt/format.h>

#include <functional>
#include <string>

namespace caldera {

enum class LogLevel { kInfo, kWarning };

// Replaces the receiver of log lines and returns the one before. The receiver may be called from any thread.
using LogSink = std::function<void(LogLevel, const std::string&)>;
LogSink set_log_sink(LogSink sink);
void log_line(LogLevel level, const std::string& line);

template <class... Args>
void log_info(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::kInfo, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void log_warning(fmt::format_string<Args...> format, Args&&... args) {
  log_line(LogLevel::kWarning, fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace caldera
