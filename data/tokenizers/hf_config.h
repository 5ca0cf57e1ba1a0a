// The small files beside a Hugging Face tokenizer: tokenizer_config.json and its older companions.
#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"

namespace caldera {

inline constexpr int64_t kMaxTokenId = int64_t{1} << 24;  // far above any vocabulary; a larger id is a broken file

// A token outside the model's own pieces, or one of them that is never made from text. The flags are HF's
// (AddedToken).
struct AddedToken {
  int64_t id = 0;
  std::string content;
  bool special = true;
  bool lstrip = false, rstrip = false, normalized = false, single_word = false;
};

struct TokenizerConfig {
  Json fields = Json::object();  // tokenizer_config.json as it stands; empty where there is none
  std::string bos_token, eos_token, unk_token, pad_token;  // "" where there is none
  std::vector<AddedToken> added_tokens;                    // ascending ids
  std::string chat_template;

  bool flag(const char* name, bool fallback) const;
  const AddedToken* find_added(std::string_view content) const;
  const AddedToken* find_added(int64_t id) const;
  // Adds the token with `id`, unless it is there; keeps ids ascending.
  void add(AddedToken token);
};

// Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json and the chat template, as far as
// they are there. Throws CheckpointError naming the file and the field that is not what HF writes.
TokenizerConfig read_tokenizer_config(const std::filesystem::path& folder);

// Writes tokenizer_config.json, special_tokens_map.json and, unless `chat_template` is empty,
// chat_template.jinja.
void write_tokenizer_config(const std::filesystem::path& folder, const TokenizerConfig& config,
                            const std::string& tokenizer_class, const std::string& chat_template);

}  // namespace caldera
