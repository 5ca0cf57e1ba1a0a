// YAML as recipes use it: maps, lists and values on one line, each with the place to report. Refused, because
// a reader of the recipe could be misled: duplicate keys, anchors and aliases, tags, tabs as indentation,
// values over several lines, several documents. Nesting is capped, so a hostile file costs nothing.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace caldera {

// Where something stands. An override has no line: line == 0.
struct Location {
  std::string source;
  int line = 0, column = 0;  // from 1
  std::string text() const;  // "configs/x.yaml:41:3", or the source alone
};

// All that is wrong, collected in one pass and reported in the order of the file.
class Faults {
 public:
  // "WHERE: PATH: WHAT"; without the path where it is empty.
  void add(const Location& where, const std::string& path, const std::string& what);
  // Throws ConfigError with a line each if there are any.
  void throw_if_any() const;

 private:
  struct Fault {
    Location where;
    std::string message;
  };
  std::vector<Fault> faults_;
};

struct YamlNode {
  enum class Kind {
    kNull,
    kScalar,
    kList,
    kMap,
    kRefused,  // reported already; whoever reads it keeps silent
  };
  Kind kind = Kind::kNull;
  std::string text;               // of a scalar
  bool quoted = false;            // "true" is text, true is not
  std::vector<std::string> keys;  // of a map: keys[i] belongs to items[i]
  std::vector<YamlNode> items;    // of a map or list
  Location where;                 // of a map's value: its key's place; else its own

  YamlNode* find(std::string_view key);  // in a map; null if there is none
  const YamlNode* find(std::string_view key) const;
  // For messages: `"x"`, `nothing`, `a list`, `a block`.
  std::string describe() const;
};

// Reads one document. Faults of form that make the rest unreadable are thrown at once (as ConfigError, with
// those found before).
YamlNode parse_yaml(std::string_view text, const std::string& source, Faults& faults);

// Lays "a.b=c" over a tree; an element of a list is named by its index or by its `name`. The value is read as
// it stands, except for null, ~, and what begins as a list, block or quoted text, which is read as YAML.
void apply_override(YamlNode& root, const std::string& assignment, Faults& faults);

}  // namespace caldera
