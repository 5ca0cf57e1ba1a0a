#include "data/tokenizers/hf_config.h"

#include <algorithm>

#include "base/chat_template.h"
#include "base/error.h"
#include "base/files.h"
#include "base/words.h"

namespace caldera {
namespace {

// A token as HF writes it: its text, or an object with "content". null and absent: "".
std::string token_text(const Json& fields, const char* name, const std::string& where) {
  const auto found = fields.find(name);
  if (found == fields.end() || found->is_null()) return "";
  const Json* text = &*found;
  if (text->is_object() && text->contains("content")) text = &text->at("content");
  CALDERA_CHECK(text->is_string(), CheckpointError, "{}: {}: expected a token's text, got {}", where, name,
                text->type_name());
  return text->get<std::string>();
}

int64_t checked_id(int64_t id, const std::string& where) {
  CALDERA_CHECK(id >= 0 && id < kMaxTokenId, CheckpointError, "{}: token id {} is out of range [0, {})",
                where, id, kMaxTokenId);
  return id;
}

void read_added_tokens_decoder(const Json& decoder, const std::string& where, TokenizerConfig& config) {
  CALDERA_CHECK(decoder.is_object(), CheckpointError, "{}: added_tokens_decoder: expected an object, got {}",
                where, decoder.type_name());
  for (const auto& [key, value] : decoder.items()) {
    CALDERA_CHECK(!key.empty() && key.size() <= 8 && key.find_first_not_of("0123456789") == std::string::npos,
                  CheckpointError, "{}: added_tokens_decoder: \"{}\" is not a token id", where, key);
    CALDERA_CHECK(value.is_object() && value.contains("content") && value["content"].is_string(),
                  CheckpointError, "{}: added_tokens_decoder: token {} has no text (\"content\")", where,
                  key);
    const auto flag = [&](const char* name) {
      return value.contains(name) && value[name].is_boolean() && value[name].get<bool>();
    };
    config.add({checked_id(std::stoll(key), where), value["content"].get<std::string>(), flag("special"),
                flag("lstrip"), flag("rstrip"), flag("normalized"), flag("single_word")});
  }
}

// Whether "additional_special_tokens" lists the token, by its text or as an object.
bool names_additional(const Json& fields, const std::string& content) {
  const auto list = fields.find("additional_special_tokens");
  if (list == fields.end() || !list->is_array()) return false;
  return std::any_of(list->begin(), list->end(), [&](const Json& entry) {
    return entry == content ||
           (entry.is_object() && entry.contains("content") && entry["content"] == content);
  });
}

}  // namespace

bool TokenizerConfig::flag(const char* name, bool fallback) const {
  const auto found = fields.find(name);
  return found != fields.end() && found->is_boolean() ? found->get<bool>() : fallback;
}

const AddedToken* TokenizerConfig::find_added(std::string_view content) const {
  for (const AddedToken& token : added_tokens) {
    if (token.content == content) return &token;
  }
  return nullptr;
}

const AddedToken* TokenizerConfig::find_added(int64_t id) const {
  const auto place = std::lower_bound(added_tokens.begin(), added_tokens.end(), id,
                                      [](const AddedToken& a, int64_t wanted) { return a.id < wanted; });
  return place != added_tokens.end() && place->id == id ? &*place : nullptr;
}

void TokenizerConfig::add(AddedToken token) {
  const auto place = std::lower_bound(added_tokens.begin(), added_tokens.end(), token.id,
                                      [](const AddedToken& a, int64_t id) { return a.id < id; });
  if (place == added_tokens.end() || place->id != token.id) added_tokens.insert(place, std::move(token));
}

TokenizerConfig read_tokenizer_config(const fs::path& folder) {
  TokenizerConfig config;
  const auto read_object = [&](const char* name) {
    const fs::path file = folder / name;
    if (!fs::exists(file)) return Json(Json::object());
    Json json = read_json(file);
    CALDERA_CHECK(json.is_object(), CheckpointError, "{}: expected a JSON object, got {}", file.string(),
                  json.type_name());
    return json;
  };
  config.fields = read_object("tokenizer_config.json");
  const Json map = read_object("special_tokens_map.json");
  const auto special = [&](const char* name) {
    std::string text = token_text(config.fields, name, (folder / "tokenizer_config.json").string());
    return text.empty() ? token_text(map, name, (folder / "special_tokens_map.json").string()) : text;
  };
  config.bos_token = special("bos_token");
  config.eos_token = special("eos_token");
  config.unk_token = special("unk_token");
  config.pad_token = special("pad_token");

  if (config.fields.contains("added_tokens_decoder")) {
    read_added_tokens_decoder(config.fields["added_tokens_decoder"],
                              (folder / "tokenizer_config.json").string(), config);
  }
  // Before transformers 4.34: {"text": id}.
  const std::string where = (folder / "added_tokens.json").string();
  const Json added_tokens = read_object("added_tokens.json");
  for (const auto& [content, id] : added_tokens.items()) {
    CALDERA_CHECK(id.is_number_integer(), CheckpointError, "{}: \"{}\": expected a token id, got {}", where,
                  content, id.type_name());
    // Only what one of the other files calls special is.
    const bool is_special = content == config.bos_token || content == config.eos_token ||
                            content == config.unk_token || content == config.pad_token ||
                            content == kImagePlaceholder || names_additional(config.fields, content) ||
                            names_additional(map, content);
    config.add({checked_id(id.get<int64_t>(), where), content, is_special, false, false, !is_special});
  }

  config.chat_template = read_chat_template(folder);
  return config;
}

void write_tokenizer_config(const fs::path& folder, const TokenizerConfig& config,
                            const std::string& tokenizer_class, const std::string& chat_template) {
  Json fields = config.fields;
  Json map = Json::object();
  // What chat_template.jinja, AutoTokenizer's class and its own folder say would otherwise be said twice,
  // differently.
  for (const char* name :
       {"chat_template", "auto_map", "tokenizer_file", "name_or_path", "backend", "is_local"}) {
    fields.erase(name);
  }
  const auto set_token = [&](const char* name, const std::string& text) {
    if (text.empty()) {
      fields.erase(name);
      return;
    }
    fields[name] = text;
    map[name] = text;
  };
  set_token("bos_token", config.bos_token);
  set_token("eos_token", config.eos_token);
  set_token("unk_token", config.unk_token);
  set_token("pad_token", config.pad_token);
  fields["additional_special_tokens"] = Json::array({kImagePlaceholder});
  map["additional_special_tokens"] = Json::array({kImagePlaceholder});
  Json decoder = Json::object();
  for (const AddedToken& token : config.added_tokens) {
    decoder[std::to_string(token.id)] = {{"content", token.content},         {"lstrip", token.lstrip},
                                         {"normalized", token.normalized},   {"rstrip", token.rstrip},
                                         {"single_word", token.single_word}, {"special", token.special}};
  }
  fields["added_tokens_decoder"] = std::move(decoder);
  fields["clean_up_tokenization_spaces"] = false;
  fields["tokenizer_class"] = tokenizer_class;
  write_json(folder / "tokenizer_config.json", fields);
  write_json(folder / "special_tokens_map.json", map);
  if (!chat_template.empty()) write_file_atomic(folder / "chat_template.jinja", chat_template);
}

}  // namespace caldera
