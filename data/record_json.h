// Data files as text: cut into records, and what is wrong with one that no JSON parser takes.
#pragma once
#include <fmt/format.h>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"

namespace caldera {

// The text of a data file without its byte order mark. Throws DataError for UTF-16 and UTF-32, which
// PowerShell and Excel write.
std::string_view utf8_text(std::string_view bytes, const std::filesystem::path& file);

// Why a text is not JSON, in the words of whoever wrote it, as far as it is one of the usual causes (NaN,
// half a character, Python's words); "" where it is another.
std::string json_fault(std::string_view json);

// Cuts a JSON list into its elements' texts without looking into them; the caller parses each, so that an
// error names the record and only one record at a time is held parsed. Throws DataError "FILE: at byte N:
// what".
class ListSplitter {
 public:
  ListSplitter(std::string_view text, const std::filesystem::path& file);
  // The next element's text; nothing at the list's end.
  std::optional<std::string_view> next();

 private:
  void skip_space();
  void skip_element();
  template <class... Args>
  void check(bool condition, fmt::format_string<Args...> format, Args&&... args) const {
    if (condition) return;
    throw DataError(fmt::format("{}: at byte {}: {}", file_.string(), at_,
                                fmt::format(format, std::forward<Args>(args)...)));
  }

  std::string_view text_;
  std::filesystem::path file_;
  size_t at_ = 0;
  int64_t num_read_ = 0;
  bool after_comma_ = false;
};

}  // namespace caldera
