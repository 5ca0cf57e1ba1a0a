// tokenizer.json for both kinds of tokenizer, written as text: its vocabulary is too large for an ordered
// JSON document.
#include <algorithm>
#include <unordered_map>

#include "base/error.h"
#include "base/files.h"
#include "data/tokenizers/factories.h"

namespace caldera {
namespace {

struct Document {
  Json normalizer, pre_tokenizer, post_processor, decoder;
  Json model;                           // but for vocab and merges
  std::vector<std::string_view> vocab;  // by id; "" where an id is not used
  std::vector<std::pair<std::string_view, std::string_view>> merges;
};

void write_document(const fs::path& file, const Document& document, const TokenizerConfig& config) {
  Json added = Json::array();
  for (const AddedToken& token : config.added_tokens) {
    added.push_back({{"id", token.id},
                     {"content", token.content},
                     {"single_word", token.single_word},
                     {"lstrip", token.lstrip},
                     {"rstrip", token.rstrip},
                     {"normalized", token.normalized},
                     {"special", token.special}});
  }
  std::string text = "{\n";
  const auto line = [&](const char* name, const Json& value) {
    text += fmt::format("  \"{}\": {},\n", name, json_line(value));
  };
  line("version", "1.0");
  line("truncation", nullptr);
  line("padding", nullptr);
  line("added_tokens", added);
  line("normalizer", document.normalizer);
  line("pre_tokenizer", document.pre_tokenizer);
  line("post_processor", document.post_processor);
  line("decoder", document.decoder);
  text += "  \"model\": {\n";
  for (const auto& [name, value] : document.model.items())
    text += fmt::format("    \"{}\": {},\n", name, json_line(value));
  text += "    \"vocab\": {";
  const char* separator = "\n";
  for (size_t id = 0; id < document.vocab.size(); ++id) {
    if (document.vocab[id].empty()) continue;
    text += fmt::format("{}      {}: {}", separator, json_line(document.vocab[id]), id);
    separator = ",\n";
  }
  text += "\n    },\n    \"merges\": [";
  separator = "\n";
  for (const auto& [left, right] : document.merges) {
    // Neither alphabet has a space, so this older form is unambiguous, and every version reads it.
    text += fmt::format("{}      {}", separator, json_line(fmt::format("{} {}", left, right)));
    separator = ",\n";
  }
  text += "\n    ]\n  }\n}\n";
  write_file_atomic(file, text);
}

Json model_json(const char* unk_token, bool byte_fallback, bool fuse_unk, bool ignore_merges) {
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", unk_token == nullptr ? Json() : Json(unk_token)},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", fuse_unk},
          {"byte_fallback", byte_fallback},
          {"ignore_merges", ignore_merges}};
}

Json byte_level_json(bool use_regex) {
  return {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", use_regex}};
}

Json steps_json(const BpeModel& model) {
  Json steps = Json::array();
  bool has_byte_level = false;
  for (const SplitStep& step : model.steps) {
    if (step.kind == SplitStep::Kind::kDigits) {
      steps.push_back({{"type", "Digits"}, {"individual_digits", true}});
    } else if (step.kind == SplitStep::Kind::kByteLevel) {
      steps.push_back(byte_level_json(true));
      has_byte_level = true;
    } else {
      steps.push_back({{"type", "Split"},
                       {"pattern", {{"Regex", step.pattern}}},
                       {"behavior", "Isolated"},
                       {"invert", false}});
    }
  }
  if (!has_byte_level) steps.push_back(byte_level_json(false));
  return {{"type", "Sequence"}, {"pretokenizers", steps}};
}

Json add_bos_json(const std::string& bos, int64_t id) {
  const auto special = [&](int type) { return Json{{"SpecialToken", {{"id", bos}, {"type_id", type}}}}; };
  const auto sequence = [](const char* name, int type) {
    return Json{{"Sequence", {{"id", name}, {"type_id", type}}}};
  };
  return {
      {"type", "TemplateProcessing"},
      {"single", Json::array({special(0), sequence("A", 0)})},
      {"pair", Json::array({special(0), sequence("A", 0), special(1), sequence("B", 1)})},
      {"special_tokens", {{bos, {{"id", bos}, {"ids", Json::array({id})}, {"tokens", Json::array({bos})}}}}}};
}

}  // namespace

void write_tokenizer_json(const fs::path& file, const BpeModel& model, const TokenizerConfig& config,
                          int64_t bos_id) {
  Document document;
  if (model.adds_bos) document.post_processor = add_bos_json(config.bos_token, bos_id);
  if (const auto& kind = model.characters) {
    document.normalizer = kind->normalizer;
    document.pre_tokenizer = kind->pre_tokenizer;
    document.decoder = kind->decoder;
    const bool has_unknown = kind->unknown >= 0;
    document.model =
        model_json(has_unknown ? model.tokens[static_cast<size_t>(kind->unknown)].c_str() : nullptr,
                   kind->byte_fallback, kind->fuse_unknown, model.ignore_merges);
  } else {
    if (model.nfc) document.normalizer = {{"type", "NFC"}};
    document.pre_tokenizer = steps_json(model);
    if (!model.adds_bos) document.post_processor = byte_level_json(true);
    document.decoder = byte_level_json(true);
    document.model = model_json(nullptr, false, false, model.ignore_merges);
  }
  document.vocab.assign(model.tokens.begin(), model.tokens.end());
  for (const auto& [left, right] : model.merges) {
    document.merges.emplace_back(document.vocab[static_cast<size_t>(left)],
                                 document.vocab[static_cast<size_t>(right)]);
  }
  write_document(file, document, config);
}

void write_sentencepiece_json(const fs::path& file, const std::vector<Piece>& pieces,
                              const TokenizerConfig& config, const SentencePieceFlags& flags) {
  Document document;
  if (flags.legacy) {
    Json steps = Json::array();
    if (flags.add_prefix) steps.push_back({{"type", "Prepend"}, {"prepend", "▁"}});
    steps.push_back({{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}});
    document.normalizer = {{"type", "Sequence"}, {"normalizers", steps}};
  } else {
    document.pre_tokenizer = {{"type", "Metaspace"},
                              {"replacement", "▁"},
                              {"prepend_scheme", flags.add_prefix ? "first" : "never"},
                              {"split", false}};
  }
  if (flags.add_bos) document.post_processor = add_bos_json(config.bos_token, flags.bos_id);
  Json decoders = Json::array({{{"type", "Replace"}, {"pattern", {{"String", "▁"}}}, {"content", " "}},
                               {{"type", "ByteFallback"}},
                               {{"type", "Fuse"}}});
  if (flags.add_prefix) decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  document.decoder = {{"type", "Sequence"}, {"decoders", decoders}};
  document.model = model_json(config.unk_token.c_str(), true, true, false);

  // SentencePiece merges any two neighbours that make a piece, the best-scored piece first. As merges: every
  // way to make each piece of two others, by score.
  std::unordered_map<std::string_view, size_t> normal;
  for (size_t id = 0; id < pieces.size(); ++id) {
    document.vocab.push_back(pieces[id].text);
    if (pieces[id].type == PieceType::kNormal) normal.emplace(pieces[id].text, id);
  }
  std::vector<size_t> order;
  for (size_t id = 0; id < pieces.size(); ++id) {
    if (pieces[id].type == PieceType::kNormal) order.push_back(id);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return pieces[a].score > pieces[b].score; });
  for (const size_t id : order) {
    const std::string_view text = document.vocab[id];
    for (size_t length = text.size() - 1; length > 0; --length) {
      const auto left = text.substr(0, length), right = text.substr(length);
      if (normal.contains(left) && normal.contains(right)) document.merges.emplace_back(left, right);
    }
  }
  write_document(file, document, config);
}

}  // namespace caldera
