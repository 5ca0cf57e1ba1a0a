#include "data/record.h"

#include <simdjson.h>

#include <algorithm>
#include <string_view>

#include "base/error.h"
#include "base/files.h"
#include "base/words.h"
#include "data/record_json.h"

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

// Keys by which other trainers give a record a meaning that it does not have here, and what to do.
struct ForeignKey {
  const char* name;
  const char* hint;
};
constexpr ForeignKey kForeignKeys[] = {
    {"video", "videos are not read; give its frames as pictures (\"image\": a list) or drop the record"},
    {"videos", "videos are not read; give its frames as pictures (\"image\": a list) or drop the record"},
    {"audio", "sound is not read; drop the record"},
    {"audios", "sound is not read; drop the record"},
    {"tools", "tools are not written into the prompt; put their description into a \"system\" turn"},
    {"weight", "samples have no weights of their own; repeat the record, or drop it"},
    {"chosen", "preferences are not trained on; put the answer into \"conversations\""},
    {"rejected", "preferences are not trained on; leave the key out"},
};
// The same of a turn.
constexpr ForeignKey kForeignTurnKeys[] = {
    {"weight", "every answer is learned, and weighs the same; leave the key out"},
    {"loss", "every answer is learned; leave the key out"},
    {"train", "every answer is learned; leave the key out"},
};

// Reads one record; its errors name the file, the record's index and, once it is known, its id.
class RecordReader {
 public:
  RecordReader(const std::filesystem::path& file, int64_t index, Answers answers)
      : where_(fmt::format("{}: record {}", file.string(), index)), index_(index), answers_(answers) {}

  Record read(dom::parser& parser, std::string_view json) {
    dom::element element;
    const auto error = parser.parse(json.data(), json.size()).get(element);
    if (error) {
      const std::string fault = json_fault(json);
      check(false, "not valid JSON: {}", fault.empty() ? simdjson::error_message(error) : fault);
    }
    check(element.is_object(), "expected an object, got {}", type_name(element));
    Record record;
    record.id = read_id(element);
    where_ += fmt::format(" (id \"{}\")", excerpt(record.id));
    refuse_foreign(element, kForeignKeys, "");
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
  // A value that says nothing, or what is so anyway, is none.
  template <size_t kNum>
  void refuse_foreign(const dom::element& object, const ForeignKey (&keys)[kNum],
                      const std::string& turn) const {
    for (const ForeignKey& key : keys) {
      const auto value = field(object, key.name);
      if (!value) continue;
      std::string_view words;
      dom::array list;
      double number = 0;
      bool flag = false;
      const bool is_empty = (!value->get(words) && words.empty()) || (!value->get(list) && list.size() == 0);
      const bool says_nothing =
          is_empty || (!value->get(number) && number == 1) || (!value->get(flag) && flag);
      check(says_nothing, "{}\"{}\": {}", turn, key.name, key.hint);
    }
  }
  // LLaVA's "image", or "images" as others have it.
  std::vector<std::string> read_images(const dom::element& object) const {
    std::vector<std::string> images;
    auto image = field(object, "image");
    const auto others = field(object, "images");
    check(!image || !others, "both \"image\" and \"images\"; keep one of them");
    const char* key = others ? "images" : "image";
    if (others) image = others;
    if (!image) return images;
    check(image->is_array() || image->is_string(), "\"{}\": expected a path or a list of paths, got {}", key,
          type_name(*image));
    if (image->is_array()) {
      for (const dom::element entry : dom::array(*image))
        images.push_back(text(entry, fmt::format("an entry of \"{}\"", key)));
    } else {
      images.push_back(text(*image, fmt::format("\"{}\"", key)));
    }
    for (const std::string& path : images) check(!path.empty(), "\"{}\": an empty path", key);
    return images;
  }
  std::vector<Turn> read_turns(const dom::element& object) const {
    const auto list = field(object, "conversations");
    check(list.has_value(), "no \"conversations\"; expected a list of {{\"from\", \"value\"}}{}",
          field(object, "messages") ? ", got \"messages\": convert them" : "");
    check(list->is_array(), "\"conversations\": expected a list, got {}", type_name(*list));
    std::vector<Turn> turns;
    std::string system;
    if (const auto words = field(object, "system")) system = text(*words, "\"system\"");
    int64_t position = -1;
    bool drops_answer = false;
    for (const dom::element entry : dom::array(*list)) {
      const std::string turn = fmt::format("turn {}", ++position);
      check(entry.is_object(), "{}: expected an object with \"from\" and \"value\", got {}", turn,
            type_name(entry));
      const auto from = field(entry, "from"), value = field(entry, "value");
      check(from && value, "{}: no \"{}\"", turn, from ? "value" : "from");
      const std::string speaker = text(*from, turn + ": \"from\"");
      // Of a question they say what happens anyway.
      if (speaker == "gpt") refuse_foreign(entry, kForeignTurnKeys, turn + ": ");
      if (speaker == "system") {
        std::string words = text(*value, turn + ": \"value\"");
        check(position == 0, "{}: from \"system\"; such a turn comes first or not at all", turn);
        check(system.empty() || words == system, "{}: another system message than \"system\" has", turn);
        check(count_placeholders(words) == 0, "{}: {} in a system message; it belongs in a human turn", turn,
              kImagePlaceholder);
        system = std::move(words);
        continue;
      }
      check(speaker == "human" || speaker == "gpt", "{}: \"from\": expected \"human\" or \"gpt\", got \"{}\"",
            turn, excerpt(speaker));
      const bool from_human = speaker == "human";
      std::string words = text(*value, turn + ": \"value\"");
      if (turns.empty() && !from_human && !drops_answer) {  // as LLaVA drops it
        drops_answer = true;
        continue;
      }
      check(from_human == (turns.size() % 2 == 0), "{}: expected \"{}\", got \"{}\": turns must alternate",
            turn, turns.size() % 2 == 0 ? "human" : "gpt", speaker);
      check(from_human || words.find_first_not_of(" \t\r\n") != std::string::npos, "{}: an empty answer",
            turn);
      check(from_human || count_placeholders(words) == 0, "{}: {} in an answer; it belongs in a human turn",
            turn, kImagePlaceholder);
      turns.push_back({from_human, std::move(words)});
    }
    check(!turns.empty(), "\"conversations\" has no turn from human");
    check(answers_ == Answers::kMayLack || turns.size() >= 2,
          "no answer: no turn from \"gpt\" follows the question, so there is nothing to learn; add one or "
          "drop the record");
    turns.front().system = std::move(system);
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
  Answers answers_;
};

constexpr std::string_view kSpace = " \t\r\n";

}  // namespace

std::vector<Record> read_records(const std::filesystem::path& file, Answers answers) {
  std::string content;
  try {
    content = read_file(file);
  } catch (const Error& error) {
    throw DataError(error.what());
  }
  std::string_view text = utf8_text(content, file);
  std::vector<Record> records;
  dom::parser parser;
  const auto add = [&](std::string_view json) {
    RecordReader reader(file, static_cast<int64_t>(records.size()), answers);
    records.push_back(reader.read(parser, json));
  };
  if (file.extension() == ".jsonl") {
    const size_t first = text.find_first_not_of(kSpace);
    CALDERA_CHECK(
        first == std::string_view::npos || text[first] != '[', DataError,
        "{}: expected a record, which begins with '{{', on each line, got a list; a file of one list "
        "must be named .json",
        file.string());
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
