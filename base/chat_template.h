// The chat template that a model's folder holds.
#pragma once
#include <filesystem>
#include <string>

namespace caldera {

// Jinja source, as transformers looks for it: chat_template.jinja, chat_template.json (older processors),
// then "chat_template" of tokenizer_config.json: a string, or a list of named ones, of which "default"
// counts. "" where there is none. Throws Error naming the file for JSON that cannot be read.
std::string read_chat_template(const std::filesystem::path& folder);

}  // namespace caldera
