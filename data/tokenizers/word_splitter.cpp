#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "base/error.h"
#include "data/tokenizers/byte_level_bpe.h"

namespace caldera {

const char* const kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

namespace {

#include "data/tokenizers/unicode_classes.inc"

// Unicode's White_Space, which tokenizers' own regular expressions take \s as; PCRE2's also has U+180E.
constexpr const char* kSpaces =
    R"(\t-\r\x20\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";

// The pattern with \s, \p{L} and \p{N} (and their opposites, outside of brackets) spelled out as tokenizers'
// own regular expressions take them: they know letters of a newer Unicode than PCRE2 may.
std::string with_their_classes(const std::string& pattern) {
  struct Class {
    std::string_view name, opposite;
    std::string members;
  };
  static const Class kClasses[] = {{"\\s", "\\S", kSpaces},
                                   {"\\p{L}", "\\P{L}", std::string("\\p{L}") + kNewLetters},
                                   {"\\p{N}", "\\P{N}", std::string("\\p{N}") + kNewNumbers}};
  std::string result;
  bool in_brackets = false;
  for (size_t i = 0; i < pattern.size();) {
    if (pattern[i] == '\\') {
      const std::string_view rest = std::string_view(pattern).substr(i);
      std::string_view taken = rest.substr(0, 2);
      std::string put(taken);
      for (const Class& known : kClasses) {
        if (rest.starts_with(known.name)) {
          taken = known.name;
          put = in_brackets ? known.members : "[" + known.members + "]";
        } else if (rest.starts_with(known.opposite) && !in_brackets) {
          taken = known.opposite;
          put = "[^" + known.members + "]";
        }
      }
      result += put;
      i += taken.size();
      continue;
    }
    in_brackets = pattern[i] == '[' || (in_brackets && pattern[i] != ']');
    result += pattern[i++];
  }
  return result;
}

}  // namespace

struct WordSplitter::Pattern {
  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  };
  std::unique_ptr<pcre2_code, Free> code;

  Pattern(const std::string& source, const std::string& where) {
    const std::string pattern = with_their_classes(source);
    int error = 0;
    size_t offset = 0;
    code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                             PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr));
    CALDERA_CHECK(code != nullptr, CheckpointError,
                  "{}: its pre-tokenizer's pattern {} cannot be compiled: {}", where, source, message(error));
    pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);  // where it fails, matching is interpreted
  }

  static std::string message(int error) {
    PCRE2_UCHAR text[256] = {};
    pcre2_get_error_message(error, text, sizeof(text));
    return reinterpret_cast<const char*>(text);
  }

  // Appends the pieces of text[begin, end), seen as a text of its own.
  void split(std::string_view text, size_t begin, size_t end, pcre2_match_data* data,
             std::vector<std::pair<size_t, size_t>>& pieces) const {
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data() + begin);
    const size_t length = end - begin;
    size_t done = 0, position = 0;
    while (position < length) {
      int result = pcre2_match(code.get(), subject, length, position, PCRE2_NO_UTF_CHECK, data, nullptr);
      if (result == PCRE2_ERROR_JIT_STACKLIMIT) {
        result = pcre2_match(code.get(), subject, length, position, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data,
                             nullptr);
      }
      if (result == PCRE2_ERROR_NOMATCH) break;
      CALDERA_CHECK(result > 0, DataError, "a text of {} bytes cannot be cut into words: {}", length,
                    message(result));
      const size_t* match = pcre2_get_ovector_pointer(data);
      if (match[1] <= match[0]) {  // an empty match: look further on, at the next character
        position = std::max(position, match[1]) + 1;
        while (position < length && (static_cast<unsigned char>(text[begin + position]) & 0xC0) == 0x80)
          ++position;
        continue;
      }
      if (match[0] > done) pieces.emplace_back(begin + done, begin + match[0]);
      pieces.emplace_back(begin + match[0], begin + match[1]);
      done = position = match[1];
    }
    if (done < length) pieces.emplace_back(begin + done, end);
  }
};

WordSplitter::WordSplitter(const std::vector<SplitStep>& steps, const std::string& where) {
  for (const SplitStep& step : steps) {
    const std::string pattern = step.kind == SplitStep::Kind::kDigits      ? R"(\p{N})"
                                : step.kind == SplitStep::Kind::kByteLevel ? kGpt2Pattern
                                                                           : step.pattern;
    patterns_.push_back(std::make_unique<Pattern>(pattern, where));
  }
}

WordSplitter::~WordSplitter() = default;

std::vector<std::pair<size_t, size_t>> WordSplitter::split(std::string_view text) const {
  std::vector<std::pair<size_t, size_t>> pieces, finer;
  if (!text.empty()) pieces.emplace_back(0, text.size());
  for (const auto& pattern : patterns_) {
    const std::unique_ptr<pcre2_match_data, Pattern::Free> data(
        pcre2_match_data_create_from_pattern(pattern->code.get(), nullptr));
    finer.clear();
    for (const auto& [begin, end] : pieces) pattern->split(text, begin, end, data.get(), finer);
    std::swap(pieces, finer);
  }
  return pieces;
}

}  // namespace caldera
