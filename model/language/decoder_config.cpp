#include <algorithm>

#include "base/error.h"
#include "model/language/decoder.h"

namespace caldera {

Json class_sizes(int64_t vocab_size, int64_t intermediate_size) {
  return {{"vocab_size", vocab_size},
          {"hidden_size", 4096},
          {"intermediate_size", intermediate_size},
          {"num_hidden_layers", 32},
          {"num_attention_heads", 32}};
}

bool ConfigReader::has(const char* key) const {
  const auto found = json_.find(key);
  return found != json_.end() && !found->is_null();
}

int64_t ConfigReader::positive(const char* key, int64_t fallback) const {
  CALDERA_CHECK(has(key) || fallback > 0, CheckpointError, "config.json of a {} model: \"{}\" is missing",
                family_, key);
  if (!has(key)) return fallback;
  const Json& value = json_[key];
  CALDERA_CHECK(
      value.is_number_integer() && value.get<int64_t>() > 0 && value.get<int64_t>() < (int64_t{1} << 31),
      CheckpointError, "config.json of a {} model: {}: expected a positive integer, got {}", family_, key,
      value.dump());
  return value.get<int64_t>();
}

double ConfigReader::number(const char* key, double fallback) const {
  if (!has(key)) return fallback;
  CALDERA_CHECK(json_[key].is_number(), CheckpointError,
                "config.json of a {} model: {}: expected a number, got {}", family_, key, json_[key].dump());
  return json_[key].get<double>();
}

bool ConfigReader::flag(const char* key, bool fallback) const {
  if (!has(key)) return fallback;
  CALDERA_CHECK(json_[key].is_boolean(), CheckpointError,
                "config.json of a {} model: {}: expected a boolean, got {}", family_, key, json_[key].dump());
  return json_[key].get<bool>();
}

void ConfigReader::read_common(DecoderConfig& c, const char* architecture) const {
  c.id = family_;
  c.vocab_size = positive("vocab_size");
  c.hidden_size = positive("hidden_size");
  c.intermediate_size = positive("intermediate_size");
  c.num_hidden_layers = positive("num_hidden_layers");
  c.num_attention_heads = positive("num_attention_heads");
  c.num_key_value_heads = positive("num_key_value_heads",
                                   c.num_key_value_heads > 0 ? c.num_key_value_heads : c.num_attention_heads);
  c.head_dim = positive(
      "head_dim", c.head_dim > 0 ? c.head_dim : std::max<int64_t>(1, c.hidden_size / c.num_attention_heads));
  c.max_position_embeddings =
      positive("max_position_embeddings", c.max_position_embeddings > 0 ? c.max_position_embeddings : 2048);
  c.rms_norm_eps = number("rms_norm_eps", 1e-6);
  c.initializer_range = number("initializer_range", 0.02);
  c.tie_word_embeddings = flag("tie_word_embeddings", false);
  CALDERA_CHECK(
      c.num_attention_heads % c.num_key_value_heads == 0, CheckpointError,
      "config.json of a {} model: num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
      family_, c.num_attention_heads, c.num_key_value_heads);
  CALDERA_CHECK(c.head_dim % 2 == 0, CheckpointError,
                "config.json of a {} model: head_dim: expected an even number, got {}", family_, c.head_dim);
  const Json act = json_.value("hidden_act", Json("silu"));
  CALDERA_CHECK(act == "silu", CheckpointError,
                "config.json of a {} model: hidden_act: only \"silu\" is supported, got {}", family_,
                act.dump());
  c.windows.assign(static_cast<size_t>(c.num_hidden_layers), 0);
  c.rope = make_rope(json_, c.head_dim, c.max_position_embeddings);

  c.json = {{"architectures", {architecture}},
            {"model_type", family_},
            {"vocab_size", c.vocab_size},
            {"hidden_size", c.hidden_size},
            {"intermediate_size", c.intermediate_size},
            {"num_hidden_layers", c.num_hidden_layers},
            {"num_attention_heads", c.num_attention_heads},
            {"num_key_value_heads", c.num_key_value_heads},
            {"head_dim", c.head_dim},
            {"max_position_embeddings", c.max_position_embeddings},
            {"hidden_act", "silu"},
            {"rms_norm_eps", c.rms_norm_eps},
            {"initializer_range", c.initializer_range},
            {"attention_dropout", 0.0},
            {"tie_word_embeddings", c.tie_word_embeddings},
            {"use_cache", true}};
  // Both spellings: transformers 4 reads the first two, transformers 5 the third.
  Json scaling = c.rope.parameters;
  scaling.erase("rope_theta");
  c.json["rope_theta"] = c.rope.parameters["rope_theta"];
  c.json["rope_scaling"] = scaling["rope_type"] == "default" ? Json() : scaling;
  c.json["rope_parameters"] = c.rope.parameters;
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"})
    if (json_.contains(key)) c.json[key] = json_[key];
}

void ConfigReader::read_sliding(DecoderConfig& c) const {
  const bool slides =
      flag("use_sliding_window", false) && (has("sliding_window") || !json_.contains("sliding_window"));
  c.json["use_sliding_window"] = slides;
  const int64_t window = slides ? positive("sliding_window", 4096) : 0;
  c.json["sliding_window"] = slides ? Json(window) : Json();
  if (!slides) return;
  Json types = Json::array();
  if (has("layer_types")) {
    types = json_["layer_types"];
  } else {
    const auto first = static_cast<int64_t>(number("max_window_layers", 28));
    for (int64_t i = 0; i < c.num_hidden_layers; ++i)
      types.push_back(i < first ? "full_attention" : "sliding_attention");
  }
  CALDERA_CHECK(types.is_array() && std::ssize(types) == c.num_hidden_layers, CheckpointError,
                "config.json of a {} model: layer_types: expected a list of {} texts, got {}", family_,
                c.num_hidden_layers, types.dump());
  for (size_t i = 0; i < types.size(); ++i) {
    CALDERA_CHECK(
        types[i] == "full_attention" || types[i] == "sliding_attention", CheckpointError,
        "config.json of a {} model: layer_types: expected full_attention or sliding_attention, got {}",
        family_, types[i].dump());
    if (types[i] == "sliding_attention") c.windows[i] = window;
  }
  c.json["layer_types"] = types;
}

}  // namespace caldera
