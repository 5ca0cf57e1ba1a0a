#include "data/record_json.h"

#include <algorithm>
#include <cctype>

namespace caldera {
namespace {

constexpr std::string_view kJsonSpace = " \t\r\n";

// The 16 bits of a \uXXXX whose backslash stands at `at`, -1 where there is none.
int escaped_unit(std::string_view json, size_t at) {
  if (json.substr(at, 2) != "\\u" || at + 6 > json.size()) return -1;
  int unit = 0;
  for (const char c : json.substr(at + 2, 4)) {
    if (std::isxdigit(static_cast<unsigned char>(c)) == 0) return -1;
    unit = unit * 16 + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
  }
  return unit;
}

bool is_high(int unit) { return unit >= 0xD800 && unit < 0xDC00; }
bool is_low(int unit) { return unit >= 0xDC00 && unit < 0xE000; }

// The fault of the string that begins behind `at`, which moves behind its end.
std::string string_fault(std::string_view json, size_t& at) {
  while (at < json.size() && json[at] != '"') {
    if (json[at] != '\\') {
      if (static_cast<unsigned char>(json[at]) < 0x20)
        return fmt::format(
            "a line break or control character (byte {:#04x}) inside a string; write it as \\u{:04x}",
            json[at], json[at]);
      ++at;
      continue;
    }
    const int unit = escaped_unit(json, at);
    const bool is_pair = is_high(unit) && is_low(escaped_unit(json, at + 6));
    if (!is_pair && (is_high(unit) || is_low(unit)))
      return fmt::format(
          "the lone surrogate {} at its byte {}, half of a character: what wrote the text cut "
          "it inside of one; write the file anew, or replace the escape",
          json.substr(at, 6), at);
    at += is_pair ? 12 : 2;
  }
  ++at;
  return "";
}

}  // namespace

std::string_view utf8_text(std::string_view bytes, const std::filesystem::path& file) {
  if (bytes.starts_with("\xEF\xBB\xBF")) return bytes.substr(3);
  const bool has_mark = bytes.starts_with("\xFF\xFE") || bytes.starts_with("\xFE\xFF");
  CALDERA_CHECK(!has_mark && bytes.substr(0, 4).find('\0') == std::string_view::npos, DataError,
                "{}: the file is UTF-16 or UTF-32 text, expected UTF-8; convert it: "
                "iconv -f UTF-16 -t UTF-8 {} > NEW.json",
                file.string(), file.filename().string());
  return bytes;
}

std::string json_fault(std::string_view json) {
  for (size_t at = 0; at < json.size();) {
    if (json[at] == '"') {
      const std::string fault = string_fault(json, ++at);
      if (!fault.empty()) return fault;
    } else if (std::isalpha(static_cast<unsigned char>(json[at])) != 0) {
      size_t end = at;
      while (end < json.size() && std::isalnum(static_cast<unsigned char>(json[end])) != 0) ++end;
      const std::string_view word = json.substr(at, end - at);
      if (word == "NaN" || word == "Infinity")
        return fmt::format(
            "{} at its byte {}, which Python writes and JSON does not know; leave the key out or write null",
            word, at);
      if (word == "None" || word == "True" || word == "False")
        return fmt::format("{} at its byte {}: Python's word; write the file with json.dump", word, at);
      at = end;
    } else if (std::isdigit(static_cast<unsigned char>(json[at])) != 0) {
      // A number with its exponent, whose "e" is no word.
      while (at < json.size() && (std::isalnum(static_cast<unsigned char>(json[at])) != 0 || json[at] == '.'))
        ++at;
    } else if (json[at] == '\'') {
      return fmt::format(
          "a single quote at its byte {}: strings stand in double quotes; write the file with "
          "json.dump",
          at);
    } else {
      ++at;
    }
  }
  return "";
}

ListSplitter::ListSplitter(std::string_view text, const std::filesystem::path& file)
    : text_(text), file_(file) {
  skip_space();
  check(at_ < text_.size(), "the file is empty; expected a list of records");
  check(text_[at_] != '{',
        "expected a list of records, which begins with '[', got an object; a file of one record a line must "
        "be named .jsonl");
  check(text_[at_] == '[', "expected a list of records, which begins with '['");
  ++at_;
}

std::optional<std::string_view> ListSplitter::next() {
  skip_space();
  if (at_ < text_.size() && text_[at_] == ']' && (num_read_ == 0 || !after_comma_)) {
    ++at_;
    skip_space();
    check(at_ == text_.size(), "text after the list's end");
    return std::nullopt;
  }
  const size_t begin = at_;
  skip_element();
  check(at_ < text_.size(), "the list is not closed: the file is cut off in record {}", num_read_);
  const std::string_view element = text_.substr(begin, at_ - begin);
  const bool is_empty = element.find_first_not_of(kJsonSpace) == std::string_view::npos;
  check(!is_empty || text_[at_] != ']', "a comma before the list's end, behind {} records", num_read_);
  check(!is_empty, "record {} is missing between two commas", num_read_);
  after_comma_ = text_[at_] == ',';
  if (after_comma_) ++at_;
  ++num_read_;
  return element;
}

void ListSplitter::skip_space() { at_ = std::min(text_.find_first_not_of(kJsonSpace, at_), text_.size()); }

// To the comma or bracket that ends the element.
void ListSplitter::skip_element() {
  int64_t depth = 0;
  bool in_string = false;
  for (; at_ < text_.size(); ++at_) {
    const char c = text_[at_];
    if (in_string) {
      if (c == '\\') ++at_;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{' || c == '[') {
      ++depth;
    } else if (c == '}' || c == ']') {
      if (depth-- == 0) return;
    } else if (c == ',' && depth == 0) {
      return;
    }
  }
  at_ = text_.size();
}

}  // namespace caldera
