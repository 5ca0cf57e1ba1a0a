// tokenizer.json, as the `tokenizers` library writes it, of a BPE kind. Read by simdjson: its
// vocabulary is an object of more members than an ordered JSON document can hold at a reasonable speed.
#include <simdjson.h>

#include <algorithm>
#include <optional>
#include <unordered_map>

#include "base/error.h"
#include "base/files.h"
#include "data/tokenizers/factories.h"

namespace caldera {
namespace {

using simdjson::dom::element;

class TokenizerJsonReader {
 public:
  TokenizerJsonReader(const fs::path& file, TokenizerConfig& config)
      : where_(file.string()), config_(config) {}

  TokenizerJsonOutline outline() {
    TokenizerJsonOutline outline;
    simdjson::dom::parser parser;
    try {
      const element root = parser.load(where_);
      read_added_tokens(root);
      simdjson::dom::object vocab;  // BPE's; unigram models have a list of pieces and scores
      simdjson::dom::array pieces;
      if (!root["model"]["vocab"].get(vocab)) {
        for (const auto field : vocab)
          outline.num_tokens = std::max(outline.num_tokens, id_of(field.value) + 1);
      } else if (!root["model"]["vocab"].get(pieces)) {
        outline.num_tokens = static_cast<int64_t>(pieces.size());
      }
      // Added tokens are listed in the model as well, or not.
      while (outline.num_tokens > 0 && config_.find_added(outline.num_tokens - 1)) --outline.num_tokens;
      const auto pre_tokenizer = member(root, "pre_tokenizer");
      outline.is_byte_level = pre_tokenizer && has_byte_level(*pre_tokenizer);
    } catch (const simdjson::simdjson_error& error) {
      throw CheckpointError(fmt::format("{}: not a tokenizer.json: {}", where_, error.what()));
    }
    outline.added_tokens = config_.added_tokens;
    return outline;
  }

  BpeModel read() {
    simdjson::dom::parser parser;
    try {
      const element root = parser.load(where_);
      read_model(root["model"]);
      read_added_tokens(root);
      if (is_of_characters(root)) {
        read_characters(root);
      } else {
        if (const auto part = member(root, "normalizer")) read_normalizer(*part);
        if (const auto part = member(root, "pre_tokenizer")) read_pre_tokenizer(*part);
        check(byte_level_, "its pre_tokenizer has no ByteLevel step");
      }
      if (const auto part = member(root, "post_processor")) read_post_processor(*part);
    } catch (const simdjson::simdjson_error& error) {
      throw CheckpointError(fmt::format("{}: not a tokenizer.json: {}", where_, error.what()));
    }
    return std::move(model_);
  }

 private:
  // A member of an object, if it is there and not null.
  static std::optional<element> member(element object, const char* name) {
    element value;
    if (object[name].get(value) == simdjson::SUCCESS && !value.is_null()) return value;
    return std::nullopt;
  }
  static bool flag(element object, const char* name, bool fallback) {
    bool value = false;
    return object[name].get(value) == simdjson::SUCCESS ? value : fallback;
  }
  static std::string type_of(element object) { return std::string(std::string_view(object["type"])); }
  void check(bool condition, const std::string& what) const {
    CALDERA_CHECK(condition, CheckpointError,
                  "{}: {}; supported are BPE tokenizers over bytes (GPT-2, SmolLM2, Qwen2, LLaMA 3) and over "
                  "characters (LLaMA, Mistral)",
                  where_, what);
  }
  int64_t id_of(element value) const {
    const int64_t id = value;
    CALDERA_CHECK(id >= 0 && id < kMaxTokenId, CheckpointError, "{}: token id {} is out of range [0, {})",
                  where_, id, kMaxTokenId);
    return id;
  }

  void read_added_tokens(element root) {
    const auto tokens = member(root, "added_tokens");
    if (!tokens) return;
    for (const element token : tokens->get_array()) {
      config_.add({id_of(token["id"]), std::string(std::string_view(token["content"])),
                   flag(token, "special", false), flag(token, "lstrip", false), flag(token, "rstrip", false),
                   flag(token, "normalized", false), flag(token, "single_word", false)});
    }
  }

  void read_normalizer(element normalizer) {
    const std::string type = type_of(normalizer);
    if (type == "Sequence") {
      for (const element step : normalizer["normalizers"].get_array()) read_normalizer(step);
      return;
    }
    check(type == "NFC", "its normalizer \"" + type + "\" is not supported");
    model_.nfc = true;
  }

  void read_pre_tokenizer(element step) {
    const std::string type = type_of(step);
    if (type == "Sequence") {
      for (const element inner : step["pretokenizers"].get_array()) read_pre_tokenizer(inner);
      return;
    }
    check(!byte_level_, "its pre_tokenizer goes on after ByteLevel");
    if (type == "ByteLevel") {
      check(!flag(step, "add_prefix_space", true), "its ByteLevel adds a space before the text");
      if (flag(step, "use_regex", true)) model_.steps.push_back({SplitStep::Kind::kByteLevel, ""});
      byte_level_ = true;
    } else if (type == "Digits") {
      check(flag(step, "individual_digits", false), "its Digits keeps digits together");
      model_.steps.push_back({SplitStep::Kind::kDigits, ""});
    } else if (type == "Split") {
      const std::string behavior{std::string_view(step["behavior"])};
      const bool invert = flag(step, "invert", false);
      // Keeping matches apart, or keeping nothing but the matches, is the same for patterns that leave
      // nothing out.
      check((behavior == "Isolated" && !invert) || (behavior == "Removed" && invert),
            "its Split \"" + behavior + "\" is not supported");
      std::string_view pattern;
      check(step["pattern"]["Regex"].get(pattern) == simdjson::SUCCESS,
            "its Split has no regular expression");
      model_.steps.push_back({SplitStep::Kind::kSplit, std::string(pattern)});
    } else {
      check(false, "its pre_tokenizer \"" + type + "\" is not supported");
    }
  }

  static bool has_byte_level(element step) {
    if (type_of(step) != "Sequence") return type_of(step) == "ByteLevel";
    for (const element inner : step["pretokenizers"].get_array())
      if (has_byte_level(inner)) return true;
    return false;
  }

  // A converted SentencePiece model: its bytes are tokens of their own, or its spaces visible ones.
  bool is_of_characters(element root) const {
    if (flag(root["model"], "byte_fallback", false)) return true;
    const auto pre_tokenizer = member(root, "pre_tokenizer");
    return pre_tokenizer && type_of(*pre_tokenizer) == "Metaspace";
  }

  Json copy_of(element root, const char* name) const {
    const auto part = member(root, name);
    return part ? parse_json(simdjson::minify(*part), where_ + ": " + name) : Json();
  }

  void read_characters(element root) {
    CharacterBpe kind;
    const element model = root["model"];
    kind.byte_fallback = flag(model, "byte_fallback", false);
    kind.fuse_unknown = flag(model, "fuse_unk", false);
    if (const auto unknown = member(model, "unk_token")) {
      const std::string_view token = *unknown;
      const auto place = std::find(model_.tokens.begin(), model_.tokens.end(), token);
      CALDERA_CHECK(place != model_.tokens.end(), CheckpointError,
                    "{}: its unk_token \"{}\" is not in the vocabulary", where_, token);
      kind.unknown = place - model_.tokens.begin();
    }
    kind.normalizer = copy_of(root, "normalizer");
    kind.pre_tokenizer = copy_of(root, "pre_tokenizer");
    kind.decoder = copy_of(root, "decoder");
    model_.characters = std::move(kind);
    if (const auto part = member(root, "normalizer")) read_space_normalizer(*part);
    if (const auto part = member(root, "pre_tokenizer")) read_metaspace(*part);
    check(replaces_spaces_, "nothing in it makes spaces visible (\"▁\")");
    if (const auto part = member(root, "decoder")) read_space_decoder(*part);
  }

  // Prepend "▁" and Replace " " by "▁".
  void read_space_normalizer(element normalizer) {
    const std::string type = type_of(normalizer);
    if (type == "Sequence") {
      for (const element step : normalizer["normalizers"].get_array()) read_space_normalizer(step);
    } else if (type == "Prepend") {
      check(!replaces_spaces_ && std::string_view(normalizer["prepend"]) == kVisibleSpace,
            "its normalizer prepends something else than \"▁\" before spaces are replaced");
      model_.characters->prefix = CharacterBpe::Prefix::kAnyway;
    } else {
      std::string_view from;
      check(type == "Replace" && !normalizer["pattern"]["String"].get(from) && from == " " &&
                std::string_view(normalizer["content"]) == kVisibleSpace,
            "its normalizer \"" + type + "\" is not supported");
      replaces_spaces_ = true;
    }
  }

  void read_metaspace(element step) {
    check(type_of(step) == "Metaspace" && std::string_view(step["replacement"]) == kVisibleSpace,
          "its pre_tokenizer \"" + type_of(step) + "\" is not supported");
    replaces_spaces_ = true;
    model_.characters->splits_words = flag(step, "split", true);
    // Files before version 0.15 of the library have a flag instead.
    std::string_view scheme = flag(step, "add_prefix_space", true) ? "always" : "never";
    if (const auto named = member(step, "prepend_scheme")) scheme = *named;
    check(scheme == "always" || scheme == "first" || scheme == "never",
          fmt::format("its prepend_scheme \"{}\" is not known", scheme));
    if (model_.characters->prefix == CharacterBpe::Prefix::kAnyway) return;
    model_.characters->prefix = scheme == "always"  ? CharacterBpe::Prefix::kAlways
                                : scheme == "first" ? CharacterBpe::Prefix::kFirst
                                                    : CharacterBpe::Prefix::kNever;
  }

  // Of the decoder nothing is free but whether the first space goes.
  void read_space_decoder(element decoder) {
    const std::string type = type_of(decoder);
    if (type == "Sequence") {
      for (const element step : decoder["decoders"].get_array()) read_space_decoder(step);
    } else if (type == "Strip") {
      model_.characters->strips_space =
          std::string_view(decoder["content"]) == " " && int64_t(decoder["start"]) > 0;
    } else if (type == "Metaspace") {
      model_.characters->strips_space = model_.characters->prefix != CharacterBpe::Prefix::kNever;
    } else {
      check(type == "Replace" || type == "ByteFallback" || type == "Fuse",
            "its decoder \"" + type + "\" is not supported");
    }
  }

  void read_post_processor(element processor) {
    const std::string type = type_of(processor);
    if (type == "Sequence") {
      for (const element step : processor["processors"].get_array()) read_post_processor(step);
    } else if (type == "TemplateProcessing") {
      element first;
      if (processor["single"].at(0)["SpecialToken"]["id"].get(first) == simdjson::SUCCESS &&
          first.is_string()) {
        model_.adds_bos = true;
        if (config_.bos_token.empty()) config_.bos_token = std::string(std::string_view(first));
      }
    }
  }

  void read_model(element model) {
    if (member(model, "type"))
      check(type_of(model) == "BPE", "its model is \"" + type_of(model) + "\"");  // older files leave it out
    for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix", "dropout"}) {
      const auto value = member(model, name);
      check(!value || (value->is_string() && std::string_view(*value).empty()),
            std::string("its model's ") + name + " is not supported");
    }
    model_.ignore_merges = flag(model, "ignore_merges", false);

    std::unordered_map<std::string_view, int32_t> ids;
    for (const auto field : model["vocab"].get_object()) {
      const auto id = static_cast<size_t>(id_of(field.value));
      if (id >= model_.tokens.size()) model_.tokens.resize(id + 1);
      CALDERA_CHECK(!field.key.empty() && model_.tokens[id].empty(), CheckpointError,
                    "{}: two tokens have the id {}, or one has no text", where_, id);
      model_.tokens[id] = std::string(field.key);
    }
    ids.reserve(model_.tokens.size());
    for (size_t id = 0; id < model_.tokens.size(); ++id)
      ids.emplace(model_.tokens[id], static_cast<int32_t>(id));
    const auto find = [&](std::string_view token) {
      const auto found = ids.find(token);
      CALDERA_CHECK(!token.empty() && found != ids.end(), CheckpointError,
                    "{}: a merge names \"{}\", which is not in the vocabulary", where_, token);
      return found->second;
    };
    for (const element merge : model["merges"].get_array()) {
      if (merge.is_array()) {
        model_.merges.emplace_back(find(merge.at(0)), find(merge.at(1)));
        continue;
      }
      const std::string_view pair = merge;
      const size_t space = pair.find(' ');
      CALDERA_CHECK(space != std::string_view::npos, CheckpointError, "{}: the merge \"{}\" is not a pair",
                    where_, pair);
      model_.merges.emplace_back(find(pair.substr(0, space)), find(pair.substr(space + 1)));
    }
  }

  std::string where_;
  TokenizerConfig& config_;
  BpeModel model_;
  bool byte_level_ = false, replaces_spaces_ = false;
};

}  // namespace

TokenizerJsonOutline outline_of_tokenizer_json(const fs::path& file) {
  TokenizerConfig config;
  return TokenizerJsonReader(file, config).outline();
}

BpeModel read_tokenizer_json(const fs::path& file, TokenizerConfig& config) {
  return TokenizerJsonReader(file, config).read();
}

}  // namespace caldera
