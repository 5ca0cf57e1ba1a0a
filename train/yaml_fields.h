// What a visit of `fields(visitor, config)` (see fields.h) can do: read a config from YAML, write it back,
// list it as Markdown.
#pragma once
#include <fmt/format.h>

#include <concepts>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "train/fields.h"
#include "train/yaml_tree.h"

namespace caldera {

// Where each key that was read stands, by its path ("stages.pretrain.optimizer.learning_rate").
struct ReadState {
  Faults& faults;
  std::map<std::string, Location> where;
  // The blocks that know a key, for one that stands in the wrong block.
  std::multimap<std::string, std::string> homes = {};

  // Reports at the key's place, or at the nearest block around it where the key was left to its default.
  void fault(const std::string& path, const std::string& what) const;
};

// One value each. `rule` limits it; faults go to the state.
void read_value(ReadState& state, const YamlNode& node, const std::string& path, bool& value,
                const FieldRule& rule);
void read_value(ReadState& state, const YamlNode& node, const std::string& path, int64_t& value,
                const FieldRule& rule);
void read_value(ReadState& state, const YamlNode& node, const std::string& path, uint64_t& value,
                const FieldRule& rule);
void read_value(ReadState& state, const YamlNode& node, const std::string& path, double& value,
                const FieldRule& rule);
void read_value(ReadState& state, const YamlNode& node, const std::string& path, std::string& value,
                const FieldRule& rule);
void read_value(ReadState& state, const YamlNode& node, const std::string& path,
                std::vector<std::string>& value, const FieldRule& rule);

// Reads one block. Every key of the YAML must be visited before finish().
class FieldReader {
 public:
  // An override's path and the messages name an element of a list by its `name` where it has one, else by its
  // index.
  static std::string element_path(const std::string& list_path, const YamlNode& list, size_t index);

  FieldReader(ReadState& state, const YamlNode& block, std::string path)
      : state_(state), block_(block), path_(std::move(path)) {}

  template <class T>
  void operator()(const char* name, T& value, const char* /*help*/, const FieldRule& rule = any()) {
    names_.push_back(name);
    const std::string path = path_.empty() ? name : path_ + "." + name;
    const YamlNode* node = block_.find(name);
    if (node == nullptr) return report_if_required(path, rule);
    state_.where[path] = node->where;
    if (node->kind != YamlNode::Kind::kRefused) read(*node, path, value, rule);
  }
  void finish() const;  // reports the keys that nobody visited

 private:
  template <class T>
  void read(const YamlNode& node, const std::string& path, T& value, const FieldRule& rule) {
    if constexpr (requires(FieldReader & visitor) { fields(visitor, value); }) {
      if (!is_kind(node, path, YamlNode::Kind::kMap, "a block of settings")) return;
      FieldReader nested(state_, node, path);
      fields(nested, value);
      nested.finish();
    } else {
      read_value(state_, node, path, value, rule);
    }
  }
  template <class T>
  void read(const YamlNode& node, const std::string& path, std::optional<T>& value, const FieldRule& rule) {
    value.reset();
    if (node.kind != YamlNode::Kind::kNull) read(node, path, value.emplace(), rule);
  }
  template <class T>
  requires(!std::same_as<T, std::string>) void read(const YamlNode& node, const std::string& path,
                                                    std::vector<T>& value, const FieldRule& rule) {
    if (!is_kind(node, path, YamlNode::Kind::kList, "a list of blocks")) return;
    if (rule.is_required && node.items.empty()) state_.fault(path, "must not be empty");
    value.assign(node.items.size(), T{});
    for (size_t i = 0; i < node.items.size(); ++i) {
      const std::string element = element_path(path, node, i);
      state_.where.emplace(element, node.items[i].where);
      if (node.items[i].kind != YamlNode::Kind::kRefused) read(node.items[i], element, value[i], any());
    }
  }
  bool is_kind(const YamlNode& node, const std::string& path, YamlNode::Kind kind,
               const char* expected) const;
  void report_if_required(const std::string& path, const FieldRule& rule) const;

  ReadState& state_;
  const YamlNode& block_;
  std::string path_;
  std::vector<std::string> names_;
};

std::string yaml_value(bool value);
std::string yaml_value(int64_t value);
std::string yaml_value(uint64_t value);
std::string yaml_value(double value);  // the shortest text that reads back as the same number
std::string yaml_value(const std::string& value);
std::string yaml_value(const std::vector<std::string>& value);

// Writes one block, a line a key.
class FieldWriter {
 public:
  template <class T>
  void operator()(const char* name, T& value, const char* /*help*/, const FieldRule& = any()) {
    write(name, value);
  }
  const std::string& text() const { return text_; }

 private:
  template <class T>
  void write(const std::string& name, T& value) {
    if constexpr (requires(FieldWriter & visitor) { fields(visitor, value); }) {
      text_ += name + ":\n" + indented(value);
    } else {
      text_ += name + ": " + yaml_value(value) + "\n";
    }
  }
  template <class T>
  void write(const std::string& name, std::optional<T>& value) {
    if (value) write(name, *value);
  }
  template <class T>
  requires(!std::same_as<T, std::string>) void write(const std::string& name, std::vector<T>& value) {
    text_ += name + ":" + (value.empty() ? " []\n" : "\n");
    for (T& element : value) {
      text_ += "- ";
      text_ += indented(element).substr(2);
    }
  }
  template <class T>
  std::string indented(T& value) {
    FieldWriter nested;
    fields(nested, value);
    return indent(nested.text_);
  }
  static std::string indent(const std::string& lines);

  std::string text_;
};

// Lists a block and those below it, each a Markdown table.
class FieldReference {
 public:
  struct Section {
    std::string path;
    std::vector<std::string> names;  // the keys
    std::string rows;                // of the table
  };
  FieldReference() : sections_(1) {}
  explicit FieldReference(std::string path) : sections_{{.path = std::move(path)}} {}

  template <class T>
  void operator()(const char* name, T& value, const char* help, const FieldRule& rule = any()) {
    add(name, value, help, rule);
  }
  const std::vector<Section>& sections() const { return sections_; }

 private:
  template <class T>
  void add(const std::string& name, T& value, const char* help, const FieldRule& rule) {
    if constexpr (requires(FieldReference & visitor) { fields(visitor, value); }) {
      add_block(name, "block", value, help, rule);
    } else {
      add_row(name, type_name(value), rule.is_required ? "required" : fmt::format("`{}`", yaml_value(value)),
              help, rule);
    }
  }
  template <class T>
  void add(const std::string& name, std::optional<T>&, const char* help, const FieldRule& rule) {
    T value{};
    if constexpr (requires(FieldReference & visitor) { fields(visitor, value); }) {
      add_block(name, "block", value, help, rule, "none");
    } else {
      add_row(name, type_name(value), "none", help, rule);
    }
  }
  template <class T>
  requires(!std::same_as<T, std::string>) void add(const std::string& name, std::vector<T>&, const char* help,
                                                   const FieldRule& rule) {
    T value{};
    add_block(name + ".NAME", "list of blocks", value, help, rule);
  }
  template <class T>
  void add_block(const std::string& name, const char* type, T& value, const char* help, const FieldRule& rule,
                 const char* fallback = "its own defaults") {
    const std::string path = sections_[0].path.empty() ? name : sections_[0].path + "." + name;
    add_row(name.substr(0, name.find('.')), type, rule.is_required ? "required" : fallback, help, rule);
    FieldReference nested(path);
    fields(nested, value);
    sections_.insert(sections_.end(), nested.sections_.begin(), nested.sections_.end());
  }
  void add_row(const std::string& name, const char* type, const std::string& fallback, const char* help,
               const FieldRule& rule);

  static const char* type_name(bool) { return "true or false"; }
  static const char* type_name(int64_t) { return "integer"; }
  static const char* type_name(uint64_t) { return "integer"; }
  static const char* type_name(double) { return "number"; }
  static const char* type_name(const std::string&) { return "text"; }
  static const char* type_name(const std::vector<std::string>&) { return "list of texts"; }

  std::vector<Section> sections_;  // the block itself, then those below it
};

// "in [0, 1)", "above 0", "at least 1"; "" where anything goes.
std::string interval(const FieldRule& rule);

}  // namespace caldera
