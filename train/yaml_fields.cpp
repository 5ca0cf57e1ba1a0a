#include "train/yaml_fields.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "base/strings.h"

namespace caldera {

void ReadState::fault(const std::string& path, const std::string& what) const {
  for (std::string at = path;; at.resize(at.rfind('.'))) {
    const auto it = where.find(at);
    if (it != where.end()) return faults.add(it->second, path, what);
    if (at.find('.') == std::string::npos) return faults.add(where.at(""), path, what);
  }
}

std::string FieldReader::element_path(const std::string& list_path, const YamlNode& list, size_t index) {
  const auto name_of = [&](size_t i) {
    const YamlNode* name = list.items[i].find("name");
    return name != nullptr && name->kind == YamlNode::Kind::kScalar ? name->text : "";
  };
  const std::string name = name_of(index);
  bool names_it = !name.empty() && name.find('.') == std::string::npos;
  for (size_t i = 0; i < index; ++i) names_it = names_it && name_of(i) != name;
  return names_it ? list_path + "." + name : fmt::format("{}.{}", list_path, index);
}

void FieldReader::finish() const {
  for (size_t i = 0; i < block_.keys.size(); ++i) {
    const std::string& key = block_.keys[i];
    if (std::find(names_.begin(), names_.end(), key) != names_.end()) continue;
    std::vector<std::string> homes;
    const auto [begin, end] = state_.homes.equal_range(key);
    for (auto home = begin; home != end; ++home)
      homes.push_back(home->second.empty() ? "the top" : home->second);
    const std::string hint =
        homes.empty() ? suggestion(key, names_) : fmt::format("; it belongs to {}", join(homes, " or "));
    state_.faults.add(block_.items[i].where, path_.empty() ? key : path_ + "." + key,
                      fmt::format("unknown key{}", hint));
  }
}

bool FieldReader::is_kind(const YamlNode& node, const std::string& path, YamlNode::Kind kind,
                          const char* expected) const {
  if (node.kind == kind) return true;
  state_.fault(path, fmt::format("expected {}, got {}", expected, node.describe()));
  return false;
}

void FieldReader::report_if_required(const std::string& path, const FieldRule& rule) const {
  if (rule.is_required) state_.fault(path, "required, but missing");
}

std::string interval(const FieldRule& rule) {
  const bool low = std::isfinite(rule.min), high = std::isfinite(rule.max);
  if (low && high)
    return fmt::format("in {}{}, {}{}", rule.open_min ? '(' : '[', rule.min, rule.max,
                       rule.open_max ? ')' : ']');
  if (low) return fmt::format("{} {}", rule.open_min ? "above" : "at least", rule.min);
  return "";
}

namespace {

bool is_allowed(double value, const FieldRule& rule) {
  return (rule.open_min ? value > rule.min : value >= rule.min) &&
         (rule.open_max ? value < rule.max : value <= rule.max);
}

// YAML 1.1 reads 010 as eight, 1.2 and people as ten.
bool has_leading_zero(std::string_view text) {
  if (text.starts_with('-')) text.remove_prefix(1);
  return text.size() > 1 && text[0] == '0' && text[1] >= '0' && text[1] <= '9';
}

template <class T>
void read_number(ReadState& state, const YamlNode& node, const std::string& path, T& value,
                 const FieldRule& rule, const std::string& noun) {
  const auto refuse = [&](const std::string& hint = "") {
    std::string limits = interval(rule);
    if (!limits.empty()) limits.insert(0, limits.starts_with("at least") ? " of " : " ");
    state.fault(path, fmt::format("expected {}{}, got {}{}", noun, limits, node.describe(), hint));
  };
  if (node.kind != YamlNode::Kind::kScalar) return refuse();
  if (node.quoted) return refuse(node.text.empty() ? "" : "; leave out the quotes");
  if (has_leading_zero(node.text)) return refuse("; leave out the leading zero");
  T parsed{};
  const char* const end = node.text.data() + node.text.size();
  const auto [stop, status] = std::from_chars(node.text.data(), end, parsed);
  if (status == std::errc::result_out_of_range && stop == end) return refuse("; it does not fit 64 bits");
  if (status != std::errc() || stop != end || !std::isfinite(static_cast<double>(parsed))) return refuse();
  if (!is_allowed(static_cast<double>(parsed), rule)) return refuse();
  value = parsed;
}

}  // namespace

void read_value(ReadState& state, const YamlNode& node, const std::string& path, bool& value,
                const FieldRule&) {
  const bool is_true = node.text == "true";
  if (node.kind != YamlNode::Kind::kScalar || node.quoted || (!is_true && node.text != "false"))
    return state.fault(path, fmt::format("expected true or false, got {}", node.describe()));
  value = is_true;
}
void read_value(ReadState& state, const YamlNode& node, const std::string& path, int64_t& value,
                const FieldRule& rule) {
  read_number(state, node, path, value, rule, "an integer");
}
void read_value(ReadState& state, const YamlNode& node, const std::string& path, uint64_t& value,
                const FieldRule& rule) {
  read_number(state, node, path, value, rule, "an integer");
}
void read_value(ReadState& state, const YamlNode& node, const std::string& path, double& value,
                const FieldRule& rule) {
  read_number(state, node, path, value, rule, "a number");
}

namespace {

std::string environment_value(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? "" : value;
}

// A path with a leading ~ and each ${NAME} replaced; `fault` says what is wrong with it, in which case it
// stays. An empty variable is as bad as none: ${DATA}/coco would become /coco.
std::string expand_path(const std::string& text, std::string& fault) {
  std::string expanded;
  size_t at = 0;
  if (text == "~" || text.starts_with("~/")) {
    at = 1;
    expanded = environment_value("HOME");
    if (expanded.empty()) fault = "~ stands for $HOME, which is not set; write the path out";
  } else if (text.starts_with('~')) {
    fault = "only ~ itself, your own home folder, is expanded; write the path out";
  }
  for (size_t begin; fault.empty() && (begin = text.find("${", at)) != std::string::npos;) {
    const size_t end = std::min(text.find('}', begin), text.size());
    const std::string name = text.substr(begin + 2, end - begin - 2);
    const auto is_allowed = [](unsigned char c) { return std::isalnum(c) != 0 || c == '_'; };
    const std::string value = environment_value(name);
    if (name.empty() || end == text.size() || !std::all_of(name.begin(), name.end(), is_allowed))
      fault = "expected ${NAME}, of letters, digits and _";
    else if (value.empty())
      fault = fmt::format("the environment has no {}, or an empty one; export {}=..., or write the path out",
                          name, name);
    expanded += text.substr(at, begin - at) + value;
    at = end + 1;
  }
  if (!fault.empty()) return text;
  expanded += text.substr(at);
  // The resolved recipe, which a run keeps, is read again.
  if (expanded.starts_with('~') || expanded.find("${") != std::string::npos)
    fault = fmt::format("becomes \"{}\", which would be expanded again; write the path out", expanded);
  return expanded;
}

bool read_text(ReadState& state, const YamlNode& node, const std::string& path, std::string& value,
               const FieldRule& rule) {
  if (node.kind != YamlNode::Kind::kScalar) {
    const char* hint = node.kind == YamlNode::Kind::kNull ? "; \"\" is the empty text" : "";
    state.fault(path, fmt::format("expected text, got {}{}", node.describe(), hint));
    return false;
  }
  if (!rule.choices.empty() &&
      std::find(rule.choices.begin(), rule.choices.end(), node.text) == rule.choices.end()) {
    const std::string near = near_match(node.text, rule.choices);
    state.fault(path, fmt::format("expected one of {}, got {}{}", join(rule.choices, ", "), node.describe(),
                                  near.empty() ? "" : fmt::format("; did you mean \"{}\"?", near)));
    return false;
  }
  value = node.text;
  std::string fault;
  if (rule.is_path) value = expand_path(node.text, fault);
  if (!fault.empty()) state.fault(path, fmt::format("\"{}\": {}", node.text, fault));
  return fault.empty();
}

}  // namespace

void read_value(ReadState& state, const YamlNode& node, const std::string& path, std::string& value,
                const FieldRule& rule) {
  if (read_text(state, node, path, value, rule) && rule.is_required && value.empty())
    state.fault(path, "must not be empty");
}

void read_value(ReadState& state, const YamlNode& node, const std::string& path,
                std::vector<std::string>& value, const FieldRule& rule) {
  if (node.kind != YamlNode::Kind::kList) {
    const std::string hint =
        node.kind == YamlNode::Kind::kScalar ? fmt::format("; write [{}]", node.text) : "";
    return state.fault(path, fmt::format("expected a list, got {}{}", node.describe(), hint));
  }
  if (rule.is_required && node.items.empty()) return state.fault(path, "must not be empty");
  value.clear();
  for (size_t i = 0; i < node.items.size(); ++i) {
    if (node.items[i].kind == YamlNode::Kind::kRefused) continue;
    const std::string element = fmt::format("{}.{}", path, i);
    state.where[element] = node.items[i].where;
    std::string text;
    if (!read_text(state, node.items[i], element, text, rule)) continue;
    if (std::find(value.begin(), value.end(), text) != value.end())
      state.fault(element, fmt::format("\"{}\" is listed twice", text));
    value.push_back(text);
  }
}

std::string yaml_value(bool value) { return value ? "true" : "false"; }
std::string yaml_value(int64_t value) { return fmt::format("{}", value); }
std::string yaml_value(uint64_t value) { return fmt::format("{}", value); }
std::string yaml_value(double value) { return fmt::format("{}", value); }

std::string yaml_value(const std::string& value) {
  const auto is_plain = [](unsigned char c) {
    return std::isalnum(c) != 0 ||
           std::string_view("_./-+").find(static_cast<char>(c)) != std::string_view::npos;
  };
  const bool starts_plain = !value.empty() && (std::isalnum(static_cast<unsigned char>(value[0])) != 0 ||
                                               value[0] == '/' || value[0] == '_');
  if (starts_plain && value != "null" && value != "Null" && value != "NULL" &&
      std::all_of(value.begin(), value.end(), is_plain))
    return value;
  // A JSON string is a YAML one.
  return nlohmann::json(value).dump(-1, ' ', /*ensure_ascii=*/false,
                                    nlohmann::json::error_handler_t::replace);
}

std::string yaml_value(const std::vector<std::string>& value) {
  std::vector<std::string> texts;
  for (const std::string& text : value) texts.push_back(yaml_value(text));
  return fmt::format("[{}]", join(texts, ", "));
}

std::string FieldWriter::indent(const std::string& lines) {
  std::string text;
  for (const std::string& line : split(lines, "\n"))
    if (!line.empty()) text += "  " + line + "\n";
  return text;
}

void FieldReference::add_row(const std::string& name, const char* type, const std::string& fallback,
                             const char* help, const FieldRule& rule) {
  std::vector<std::string> choices;
  for (const std::string& choice : rule.choices) choices.push_back(fmt::format("`{}`", choice));
  const std::string allowed = choices.empty() ? interval(rule) : join(choices, ", ");
  sections_[0].names.push_back(name);
  sections_[0].rows += fmt::format("| `{}` | {} | {} | {} | {} |\n", name, rule.is_path ? "path" : type,
                                   fallback, allowed, help);
}

}  // namespace caldera
