#include "data/record.h"

#include <simdjson.h>

#include <algorithm>
#include <string_view>

#include "base/error.h"
#include "base/files.h"
#include "base/words.h"

namespace caldera {
namespace {

namespace dom = simdjson::dom;

const char* type_name(const dom::element& element) {
  switch (element.type()) {
    case dom::element_type::ARRAY:
      return "a list";
    case dom::element_type::OBJECT:
      return "an object";
    case dom::element_type::STRING:
      return "a string";
    case dom::element_type::BOOL:
      return "true or false";
    case dom::element_type::NULL_VALUE:
      return "null";
    default:
      return "a number";
  }
}

// Enough of a text to recognise it in a message.
std::string excerpt(std::string_view text) {
  return text.size() <= 60 ? std::string(text) : std::string(text.substr(0, 57)) + "...";
}

int64_t count_placeholders(std::string_view text) {
  const std::string_view placeholder = kImagePlaceholder;
  int64_t count = 0;
  for (size_t at = text.find(placeholder); at != std::string_view::npos; at = text.find(placeholder, at + 1))
    ++count;
  return count;
}

// Reads one record; its errors name the file, the record's index and, once it is known, its id.
class RecordReader {
 public:
  RecordReader(const std::filesystem::path& file, int64_t index)
      : where_(fmt::format("{}: record {}", file.string(), index)), index_(index) {}

  Record read(dom::parser& parser, std::string_view json) {
    dom::element element;
    const auto error = parser.parse(json.data(), json.size()).get(element);
    check(!error, "not valid JSON: {}", simdjson::error_message(error));
    check(element.is_object(), "expected an object, got {}", type_name(element));
    Record record;
    record.id = read_id(element);
    where_ += fmt::format(" (id \"{}\")", excerpt(record.id));
    record.images = read_images(element);
    record.turns = read_turns(element);
    if (const auto type = field(element, "type")) record.type = text(*type, "\"type\"");
    if (const auto mark = field(element, "held_out")) {
      check(mark->is_bool(), "\"held_out\": expected true or false, got {}", type_name(*mark));
      record.held_out = bool(*mark);
    }
    check_placeholders(record);
    return record;
  }

 private:
  template <class... Args>
  void check(bool condition, fmt::format_string<Args...> format, Args&&... args) const {
    if (condition) return;
    throw DataError(fmt::format("{}: {}", where_, fmt::format(format, std::forward<Args>(args)...)));
  }
  // Absent and null are the same.
  static std::optional<dom::element> field(const dom::element& object, std::string_view name) {
    dom::element value;
    if (object[name].get(value) || value.is_null()) return std::nullopt;
    return value;
  }
  std::string text(const dom::element& element, const std::string& what) const {
    std::string_view value;
    check(!element.get(value), "{}: expected a string, got {}", what, type_name(element));
    return std::string(value);
  }

  std::string read_id(const dom::element& object) const {
    const auto id = field(object, "id");
    if (!id) return std::to_string(index_);
    if (id->is_number()) return simdjson::minify(*id);
    return text(*id, "\"id\"");
  }
  std::vector<std::string> read_images(const dom::element& object) const {
    std::vector<std::string> images;
    const auto image = field(object, "image");
    if (!image) return images;
    check(image->is_array() || image->is_string(), "\"image\": expected a path or a list of paths, got {}",
          type_name(*image));
    if (image->is_array()) {
      for (const dom::element entry : dom::array(*image))
        images.push_back(text(entry, "an entry of \"image\""));
    } else {
      images.push_back(text(*image, "\"image\""));
    }
    for (const std::string& path : images) check(!path.empty(), "\"image\": an empty path");
    return images;
  }
  std::vector<Turn> read_turns(const dom::element& object) const {
    const auto list = field(object, "conversations");
    check(list.has_value(), "no \"conversations\"; expected a list of {{\"from\", \"value\"}}");
    check(list->is_array(), "\"conversations\": expected a list, got {}", type_name(*list));
    std::vector<Turn> turns;
    int64_t position = -1;
    for (const dom::element entry : dom::array(*list)) {
      const std::string turn = fmt::format("turn {}", ++position);
      check(entry.is_object(), "{}: expected an object with \"from\" and \"value\", got {}", turn,
            type_name(entry));
      const auto from = field(entry, "from"), value = field(entry, "value");
      check(from && value, "{}: no \"{}\"", turn, from ? "value" : "from");
      const std::string speaker = text(*from, turn + ": \"from\"");
      check(speaker == "human" || speaker == "gpt", "{}: \"from\": expected \"human\" or \"gpt\", got \"{}\"",
            turn, excerpt(speaker));
      const bool from_human = speaker == "human";
      std::string words = text(*value, turn + ": \"value\"");
      if (position == 0 && !from_human) continue;  // as LLaVA drops it
      check(from_human == (turns.size() % 2 == 0), "{}: expected \"{}\", got \"{}\": turns must alternate",
            turn, turns.size() % 2 == 0 ? "human" : "gpt", speaker);
      check(from_human || words.find_first_not_of(" \t\r\n") != std::string::npos, "{}: an empty answer",
            turn);
      check(from_human || count_placeholders(words) == 0, "{}: {} in an answer; it belongs in a human turn",
            turn, kImagePlaceholder);
      turns.push_back({from_human, std::move(words)});
    }
    check(!turns.empty(), "\"conversations\" has no turn from human");
    return turns;
  }
  void check_placeholders(const Record& record) const {
    int64_t count = 0;
    for (const Turn& turn : record.turns) count += count_placeholders(turn.value);
    check(count == static_cast<int64_t>(record.images.size()),
          "expected one {} for each of its {} images, got {}", kImagePlaceholder, record.images.size(),
          count);
  }

  std::string where_;
  int64_t index_;
};

constexpr std::string_view kSpace = " \t\r\n";

// Cuts a JSON list into its elements' texts without looking into them; the caller parses each, so that an
// error names the record and only one record at a time is held parsed.
class ListSplitter {
 public:
  ListSplitter(std::string_view text, const std::filesystem::path& file) : text_(text), file_(file) {
    skip_space();
    check(at_ < text_.size(), "the file is empty; expected a list of records");
    check(text_[at_] == '[', "expected a list of records, which begins with '['");
    ++at_;
  }
  // The next element's text; nothing at the list's end.
  std::optional<std::string_view> next() {
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
    check(element.find_first_not_of(kSpace) != std::string_view::npos,
          "record {} is missing between two commas", num_read_);
    after_comma_ = text_[at_] == ',';
    if (after_comma_) ++at_;
    ++num_read_;
    return element;
  }

 private:
  void skip_space() { at_ = std::min(text_.find_first_not_of(kSpace, at_), text_.size()); }
  // To the comma or bracket that ends the element.
  void skip_element() {
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

}  // namespace

std::vector<Record> read_records(const std::filesystem::path& file) {
  std::string content;
  try {
    content = read_file(file);
  } catch (const Error& error) {
    throw DataError(error.what());
  }
  std::string_view text = content;
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  std::vector<Record> records;
  dom::parser parser;
  const auto add = [&](std::string_view json) {
    records.push_back(RecordReader(file, static_cast<int64_t>(records.size())).read(parser, json));
  };
  if (file.extension() == ".jsonl") {
    while (!text.empty()) {
      const size_t end = std::min(text.find('\n'), text.size());
      const std::string_view line = text.substr(0, end);
      if (line.find_first_not_of(kSpace) != std::string_view::npos) add(line);
      text.remove_prefix(std::min(end + 1, text.size()));
    }
  } else {
    ListSplitter list(text, file);
    while (const auto element = list.next()) add(*element);
  }
  CALDERA_CHECK(!records.empty(), DataError, "{}: no records", file.string());
  return records;
}

}  // namespace caldera
