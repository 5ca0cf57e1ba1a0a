#include "train/yaml_tree.h"

#include <simdjson.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <charconv>
#include <set>
#include <sstream>
#include <tuple>

#include "base/error.h"
#include "base/strings.h"

namespace caldera {

std::string Location::text() const {
  return line == 0 ? source : fmt::format("{}:{}:{}", source, line, column);
}

void Faults::add(const Location& where, const std::string& path, const std::string& what) {
  faults_.push_back({where, path.empty() ? what : fmt::format("{}: {}", path, what)});
}

void Faults::throw_if_any() const {
  if (faults_.empty()) return;
  constexpr size_t kMaxShown = 50;
  std::vector<Fault> sorted = faults_;
  // The file's faults in its order, then the overrides' in theirs.
  std::stable_sort(sorted.begin(), sorted.end(), [](const Fault& a, const Fault& b) {
    const auto rank = [](const Fault& f) {
      return std::tuple(f.where.line == 0, f.where.line, f.where.column);
    };
    return rank(a) < rank(b);
  });
  std::vector<std::string> lines;
  for (size_t i = 0; i < std::min(sorted.size(), kMaxShown); ++i)
    lines.push_back(fmt::format("{}: {}", sorted[i].where.text(), sorted[i].message));
  if (sorted.size() > kMaxShown)
    lines.push_back(fmt::format("... and {} more faults", sorted.size() - kMaxShown));
  throw ConfigError(join(lines, "\n"));
}

YamlNode* YamlNode::find(std::string_view key) {
  const auto it = std::find(keys.begin(), keys.end(), key);
  return it == keys.end() ? nullptr : &items[static_cast<size_t>(it - keys.begin())];
}
const YamlNode* YamlNode::find(std::string_view key) const { return const_cast<YamlNode*>(this)->find(key); }

std::string YamlNode::describe() const {
  switch (kind) {
    case Kind::kScalar:
      return quoted ? fmt::format("the text \"{}\"", text) : fmt::format("\"{}\"", text);
    case Kind::kList:
      return "a list";
    case Kind::kMap:
      return "a block";
    default:
      return "nothing";
  }
}

namespace {

constexpr size_t kMaxDepth = 16;
constexpr size_t kMaxBytes = 256 * 1000;

// Builds the tree from yaml-cpp's events. (Its own nodes take the first of two equal keys, follow aliases,
// and put an empty value's mark on the next line.)
class TreeBuilder final : public YAML::EventHandler {
 public:
  TreeBuilder(std::string_view text, std::string source, bool is_file, Faults& faults)
      : text_(text), source_(std::move(source)), is_file_(is_file), faults_(faults) {}
  YamlNode take_root() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (num_documents_++ > 0) stop(mark, "a second document begins here; a recipe is one document");
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override { add({}, mark, anchor, "?"); }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    faults_.add(at(mark), "", "an alias (*name) is not taken; write the value out");
    add({.kind = YamlNode::Kind::kRefused}, mark, 0, "?");
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    YamlNode node{.kind = YamlNode::Kind::kScalar, .text = value, .quoted = tag == "!"};
    // A tagged or anchored value begins with its tag, and is refused for it.
    if (anchor == 0 && (tag == "?" || tag == "!") && !on_one_line(static_cast<size_t>(mark.pos), node)) {
      faults_.add(at(mark), "", "a value must begin and end on one line (is a quote left open?)");
      node.kind = YamlNode::Kind::kRefused;
    }
    add(std::move(node), mark, anchor, tag);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::kList, mark, tag, anchor);
  }
  void OnSequenceEnd() override { close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    open(YamlNode::Kind::kMap, mark, tag, anchor);
  }
  void OnMapEnd() override { close(); }

  Location at(const YAML::Mark& mark) const {
    return is_file_ ? Location{source_, mark.line + 1, mark.column + 1} : Location{source_};
  }
  [[noreturn]] void stop(const YAML::Mark& mark, const std::string& what) {
    faults_.add(at(mark), "", what);
    faults_.throw_if_any();
    throw ConfigError(what);  // unreachable: there is a fault
  }

 private:
  struct Frame {
    YamlNode node;
    YAML::Mark mark;
    std::set<std::string> keys;
    bool is_refused = false, has_key = false, drop_value = false;
    std::string key;
    Location key_where;
  };

  void open(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    if (stack_.size() == kMaxDepth) stop(mark, fmt::format("nested deeper than {} levels", kMaxDepth));
    const bool is_refused = refuse_decoration(mark, tag, anchor);
    stack_.push_back({.node = {.kind = kind, .where = at(mark)}, .mark = mark, .is_refused = is_refused});
  }
  void close() {
    Frame frame = std::move(stack_.back());
    stack_.pop_back();
    if (frame.is_refused) frame.node.kind = YamlNode::Kind::kRefused;
    add(std::move(frame.node), frame.mark, 0, "?");
  }

  bool refuse_decoration(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    if (anchor != 0)
      faults_.add(at(mark), "", "an anchor (&name) is not taken; write the value out where it is needed");
    const bool tagged = !tag.empty() && tag != "?" && tag != "!";
    if (tagged) faults_.add(at(mark), "", "a tag (!name) is not taken; the key decides what its value is");
    return anchor != 0 || tagged;
  }

  void add(YamlNode node, const YAML::Mark& mark, YAML::anchor_t anchor, const std::string& tag) {
    if (refuse_decoration(mark, tag, anchor)) node.kind = YamlNode::Kind::kRefused;
    if (stack_.empty()) {
      node.where = at(mark);
      root_ = std::move(node);
      return;
    }
    Frame& frame = stack_.back();
    if (frame.node.kind == YamlNode::Kind::kList) {
      // The mark of an empty element is the next token's: its list's place is nearer.
      node.where = node.kind == YamlNode::Kind::kNull ? frame.node.where : at(mark);
      frame.node.items.push_back(std::move(node));
    } else if (!frame.has_key) {
      add_key(frame, node, mark);
    } else {
      frame.has_key = false;
      if (frame.drop_value) return;
      node.where = frame.key_where;
      frame.node.keys.push_back(frame.key);
      frame.node.items.push_back(std::move(node));
    }
  }

  void add_key(Frame& frame, const YamlNode& node, const YAML::Mark& mark) {
    frame.has_key = true;
    frame.key = node.text;
    frame.key_where = at(mark);
    frame.drop_value = true;
    if (node.kind == YamlNode::Kind::kRefused) return;
    if (node.kind != YamlNode::Kind::kScalar) {
      faults_.add(at(mark), "", fmt::format("a key must be a word, got {}", node.describe()));
    } else if (!frame.keys.insert(node.text).second) {
      faults_.add(at(mark), "", fmt::format("the key \"{}\" is given twice in this block", node.text));
    } else {
      frame.drop_value = false;
    }
  }

  // Whether a scalar stands on the line where it begins. yaml-cpp joins the lines of a value, and takes a
  // quote that is never closed to end with the file.
  bool on_one_line(size_t begin, const YamlNode& node) const {
    const std::string_view line = text_.substr(std::min(begin, text_.size()));
    if (!node.quoted) return line.starts_with(node.text);
    const char quote = line.empty() ? '\n' : line[0];
    if (quote != '\'' && quote != '"') return false;
    for (size_t i = 1; i < line.size() && line[i] != '\n'; ++i) {
      if (quote == '"' && line[i] == '\\') {
        if (i + 1 < line.size() && line[i + 1] == '\n') return false;
        ++i;
      } else if (line[i] == quote) {
        if (quote == '"' || i + 1 == line.size() || line[i + 1] != '\'') return true;
        ++i;
      }
    }
    return false;
  }

  std::string_view text_;
  std::string source_;
  bool is_file_;
  Faults& faults_;
  std::vector<Frame> stack_;
  YamlNode root_;
  int num_documents_ = 0;
};

void check_characters(std::string_view text, const std::string& source, Faults& faults) {
  CALDERA_CHECK(text.size() <= kMaxBytes, ConfigError, "{}: {} long; a recipe is at most {}", source,
                human_bytes(static_cast<double>(text.size())), human_bytes(kMaxBytes));
  CALDERA_CHECK(
      text.find('\0') == std::string_view::npos && simdjson::validate_utf8(text.data(), text.size()),
      ConfigError, "{}: not a text in UTF-8; is this the recipe?", source);
  int line_number = 0;
  for (const std::string& line : split(text, "\n")) {
    ++line_number;
    const size_t indent = line.find_first_not_of(' ');
    const bool has_content = line.find_first_not_of(" \t\r") != std::string::npos;
    if (has_content && indent != std::string::npos && line[indent] == '\t')
      faults.add({source, line_number, static_cast<int>(indent) + 1}, "",
                 "a tab indents this line; YAML takes spaces alone");
  }
  faults.throw_if_any();
}

YamlNode parse(std::string_view text, const std::string& source, bool is_file, Faults& faults) {
  TreeBuilder builder(text, source, is_file, faults);
  std::istringstream stream{std::string(text)};
  try {
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::ParserException& error) {
    builder.stop(error.mark,
                 fmt::format("not valid YAML: {}; look at indentation, quotes and brackets here", error.msg));
  }
  return builder.take_root();
}

std::vector<std::string> names_of(const YamlNode& list) {
  std::vector<std::string> names;
  for (const YamlNode& item : list.items) {
    const YamlNode* name = item.find("name");
    names.push_back(name == nullptr ? std::to_string(names.size()) : name->text);
  }
  return names;
}

YamlNode* find_element(YamlNode& list, const std::string& part) {
  size_t index = 0;
  const auto [end, status] = std::from_chars(part.data(), part.data() + part.size(), index);
  if (status == std::errc() && end == part.data() + part.size())
    return index < list.items.size() ? &list.items[index] : nullptr;
  const std::vector<std::string> names = names_of(list);
  const auto it = std::find(names.begin(), names.end(), part);
  return it == names.end() ? nullptr : &list.items[static_cast<size_t>(it - names.begin())];
}

YamlNode parse_override_value(const std::string& value, const Location& where, Faults& faults) {
  if (!value.empty() && std::string_view("[{\"'").find(value[0]) != std::string_view::npos)
    return parse(value, where.source, /*is_file=*/false, faults);
  if (value == "null" || value == "~") return {};
  return {.kind = YamlNode::Kind::kScalar, .text = value, .quoted = value.empty()};
}

}  // namespace

YamlNode parse_yaml(std::string_view text, const std::string& source, Faults& faults) {
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  check_characters(text, source, faults);
  return parse(text, source, /*is_file=*/true, faults);
}

void apply_override(YamlNode& root, const std::string& assignment, Faults& faults) {
  const Location where{fmt::format("<override '{}'>", assignment)};
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals == 0)
    return faults.add(where, "", "expected key.path=value, as in stages.pretrain.max_steps=10");
  const std::string path = strip(assignment.substr(0, equals));
  YamlNode value = parse_override_value(strip(assignment.substr(equals + 1)), where, faults);
  if (value.kind == YamlNode::Kind::kRefused) return;

  const std::vector<std::string> parts = split(path, ".");
  YamlNode* node = &root;
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::string& part = parts[i];
    if (part.empty()) return faults.add(where, "", fmt::format("the path \"{}\" has an empty part", path));
    const std::string so_far = join({parts.begin(), parts.begin() + static_cast<std::ptrdiff_t>(i)}, ".");
    YamlNode* next = nullptr;
    if (node->kind == YamlNode::Kind::kList) {
      next = find_element(*node, part);
      if (next == nullptr)
        return faults.add(where, so_far,
                          fmt::format("has no element \"{}\"{}", part, suggestion(part, names_of(*node))));
    } else if (node->kind == YamlNode::Kind::kMap || node->kind == YamlNode::Kind::kNull) {
      node->kind = YamlNode::Kind::kMap;
      next = node->find(part);
      if (next == nullptr) {
        node->keys.push_back(part);
        node->items.push_back({.where = where});
        next = &node->items.back();
      }
    } else {
      if (node->kind == YamlNode::Kind::kRefused) return;
      return faults.add(where, so_far, fmt::format("is a single value, it has no \"{}\"", part));
    }
    node = next;
  }
  *node = std::move(value);
  node->where = where;
}

}  // namespace caldera
