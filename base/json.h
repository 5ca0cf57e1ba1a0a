// JSON for configurations and headers (data files go through simdjson).
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace caldera {

using Json = nlohmann::ordered_json;

// Parses; throws Error "WHERE: not valid JSON at byte N: ..." also for nesting deeper than 64 levels (copying such a
// document would overflow the stack).
Json parse_json(std::string_view text, const std::string& where);
// What a text says that need not be JSON, from another process for one: null where it is not.
Json json_or_null(std::string_view text);
Json read_json(const std::filesystem::path& path);
// Two-space indented, atomically.
void write_json(const std::filesystem::path& path, const Json& json);
// Any text, valid UTF-8 or not, as a JSON string: broken bytes become U+FFFD.
std::string json_line(const Json& json);

}  // namespace caldera
