#include "base/chat_template.h"

#include "base/files.h"
#include "base/json.h"

namespace caldera {
namespace {

// A string, or (for several templates) a list of {"name", "template"} of which "default" counts.
std::string chat_template_of(const Json& fields) {
  const auto found = fields.find("chat_template");
  if (found == fields.end()) return "";
  if (found->is_string()) return found->get<std::string>();
  if (!found->is_array()) return "";
  for (const Json& entry : *found) {
    if (entry.is_object() && entry.value("name", "") == "default") return entry.value("template", "");
  }
  return "";
}

}  // namespace

std::string read_chat_template(const fs::path& folder) {
  if (fs::exists(folder / "chat_template.jinja")) return read_file(folder / "chat_template.jinja");
  for (const char* name : {"chat_template.json", "tokenizer_config.json"}) {
    if (!fs::exists(folder / name)) continue;
    const Json fields = read_json(folder / name);
    std::string jinja = fields.is_object() ? chat_template_of(fields) : "";
    if (!jinja.empty()) return jinja;
  }
  return "";
}

}  // namespace caldera
