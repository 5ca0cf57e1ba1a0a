// Typed access to fields of configurations that come from strangers' folders: never a json exception, always
// a CheckpointError that names the file, the key, what was expected and what was found.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/lfs_pointer.h"

namespace caldera {

// A JSON file of a model's folder.
inline Json read_config(const std::filesystem::path& file) {
  CALDERA_CHECK(std::filesystem::is_regular_file(file), CheckpointError, "{}: no such file", file.string());
  try {
    const std::string text = read_file(file);
    refuse_lfs_pointer(text, file.string());
    Json json = parse_json(text, file.string());
    CALDERA_CHECK(json.is_object(), CheckpointError, "{}: expected a JSON object", file.string());
    return json;
  } catch (const CheckpointError&) {
    throw;
  } catch (const Error& error) {
    throw CheckpointError(error.what());
  }
}

// What a folder says about its pictures: preprocessor_config.json, else (transformers 5) a part of
// processor_config.json, else an empty object.
inline Json read_preprocessor_config(const std::filesystem::path& folder) {
  if (std::filesystem::exists(folder / "preprocessor_config.json"))
    return read_config(folder / "preprocessor_config.json");
  if (!std::filesystem::exists(folder / "processor_config.json")) return Json::object();
  const Json processor = read_config(folder / "processor_config.json");
  return processor.contains("image_processor") ? Json(processor["image_processor"]) : Json::object();
}

inline int64_t integer_field(const Json& config, const std::string& where, const char* key, int64_t fallback,
                             int64_t low, int64_t high) {
  if (!config.contains(key) || config[key].is_null()) return fallback;
  const Json& value = config[key];
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() || value.get<uint64_t>() <= INT64_MAX) &&
                    value.get<int64_t>() >= low && value.get<int64_t>() <= high;
  CALDERA_CHECK(fits, CheckpointError, "{}: {}: expected an integer from {} to {}, got {}", where, key, low,
                high, json_line(value));
  return value.get<int64_t>();
}

inline double number_field(const Json& config, const std::string& where, const char* key, double fallback) {
  if (!config.contains(key) || config[key].is_null()) return fallback;
  CALDERA_CHECK(config[key].is_number(), CheckpointError, "{}: {}: expected a number, got {}", where, key,
                json_line(config[key]));
  return config[key].get<double>();
}

inline std::string text_field(const Json& config, const std::string& where, const char* key,
                              const std::string& fallback) {
  if (!config.contains(key) || config[key].is_null()) return fallback;
  CALDERA_CHECK(config[key].is_string(), CheckpointError, "{}: {}: expected a string, got {}", where, key,
                json_line(config[key]));
  return config[key].get<std::string>();
}

inline bool boolean_field(const Json& config, const std::string& where, const char* key, bool fallback) {
  if (!config.contains(key) || config[key].is_null()) return fallback;
  CALDERA_CHECK(config[key].is_boolean(), CheckpointError, "{}: {}: expected true or false, got {}", where,
                key, json_line(config[key]));
  return config[key].get<bool>();
}

}  // namespace caldera
