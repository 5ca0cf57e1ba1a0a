// Keys, names and types are those of llama.cpp's convert_hf_to_gguf.py (LlamaModel, Qwen2Model, Qwen3Model).
#include "model/weights/gguf_export.h"

#include <cmath>
#include <map>

#include "base/error.h"
#include "base/log.h"
#include "model/language/rope.h"
#include "model/weights/gguf_encode.h"
#include "model/weights/gguf_export_parts.h"
#include "model/weights/gguf_names.h"

namespace caldera {
namespace {

// llama.cpp's numbers for what a file mostly holds (general.file_type).
uint32_t file_type(GgmlType type) {
  switch (type) {
    case GgmlType::kF32:
      return 0;
    case GgmlType::kF16:
      return 1;
    case GgmlType::kQ8_0:
      return 7;
    case GgmlType::kBF16:
      return 32;
    case GgmlType::kQ4_K:
      return 15;
    case GgmlType::kQ5_K:
      return 17;
    case GgmlType::kQ6_K:
      return 18;
    case GgmlType::kQ5_0:
    case GgmlType::kQ5_1:
      break;  // types of single tensors
  }
  assert_failed("GgmlType of a file", __FILE__, __LINE__);
}

bool is_k_type(GgmlType type) {
  return type == GgmlType::kQ4_K || type == GgmlType::kQ5_K || type == GgmlType::kQ6_K;
}

// The type of one of the decoder's tensors, as llama-quantize chooses it (llama_tensor_get_type_impl in
// llama-quant.cpp).
GgmlType decoder_type(const std::string& name, GgmlType type, const Json& config) {
  if (!is_k_type(type)) return type;
  const bool tied = config.value("tie_word_embeddings", false);
  if (name == "output.weight" || (tied && name == "token_embd.weight")) return GgmlType::kQ6_K;
  const bool is_value = name.ends_with(".attn_v.weight");
  if (type == GgmlType::kQ6_K || !(is_value || name.ends_with(".ffn_down.weight"))) return type;
  // The first and last eighth of the layers, and every third between.
  const int64_t layer = std::stoll(name.substr(std::string("blk.").size())),
                layers = config.at("num_hidden_layers");
  if (layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2) return GgmlType::kQ6_K;
  // Models of 80 layers (70 B) share one attn_v among eight heads.
  const bool is_70b = layers == 80 && config.at("num_key_value_heads") != config.at("num_attention_heads");
  return is_value && is_70b ? GgmlType::kQ5_K : type;
}

// Where rows are no whole blocks.
GgmlType fallback_of(GgmlType type) {
  switch (type) {
    case GgmlType::kQ4_K:
      return GgmlType::kQ5_0;
    case GgmlType::kQ5_K:
      return GgmlType::kQ5_1;
    case GgmlType::kQ6_K:
      return GgmlType::kQ8_0;
    default:
      return GgmlType::kF16;
  }
}

const GgufArchitecture& architecture_of(const LanguageModel& language) {
  const std::string model_type = language.config().at("model_type");
  std::vector<std::string> known;
  for (const GgufArchitecture& architecture : gguf_architectures())
    for (const char* type : architecture.model_types) {
      if (model_type == type) return architecture;
      known.emplace_back(type);
    }
  throw ConfigError(
      fmt::format("--format gguf: no llama.cpp architecture is known for a {} decoder; known: {}", model_type,
                  fmt::join(known, ", ")));
}

Json rope_of(const LanguageModel& language) { return language.config().at("rope_parameters"); }

// llama.cpp multiplies its YaRN magnitude, 0.1 ln(factor) + 1, by rope.scaling.attn_factor.
double yarn_magnitude(double factor) { return factor <= 1 ? 1.0 : 0.1 * std::log(factor) + 1.0; }

uint32_t size_of(const Json& config, const char* key) { return config.at(key).get<uint32_t>(); }

void add_rope(GgufFields& fields, const std::string& prefix, const LanguageModel& language) {
  const Json config = language.config(), rope = rope_of(language);
  const std::string type = rope.at("rope_type");
  fields.emplace_back(prefix + "rope.dimension_count", size_of(config, "head_dim"));
  fields.emplace_back(prefix + "rope.freq_base", rope.at("rope_theta").get<float>());
  if (type == "default") return;
  // For reading the file back: llama3's parameters cannot be told from its frequencies.
  fields.emplace_back("caldera.rope_parameters", json_line(rope));
  if (type == "llama3") return;  // rope_freqs.weight says it all
  fields.emplace_back(prefix + "rope.scaling.type", type);
  const auto factor = rope.at("factor").get<float>();
  fields.emplace_back(prefix + "rope.scaling.factor", factor);
  if (type != "yarn") return;
  fields.emplace_back(prefix + "rope.scaling.original_context_length",
                      static_cast<uint32_t>(rope.value("original_max_position_embeddings",
                                                       language.max_position_embeddings())));
  fields.emplace_back(prefix + "rope.scaling.yarn_beta_fast", rope.value("beta_fast", 32.0f));
  fields.emplace_back(prefix + "rope.scaling.yarn_beta_slow", rope.value("beta_slow", 1.0f));
  const double magnitude =
      make_rope(config, config.at("head_dim"), language.max_position_embeddings()).attention_scaling;
  const double expected = yarn_magnitude(factor);
  if (std::abs(magnitude - expected) > 1e-6 * expected)
    fields.emplace_back(prefix + "rope.scaling.attn_factor", static_cast<float>(magnitude / expected));
}

// How many tokens llama.cpp may attend to: all of its context, so no more than a sliding window holds.
int64_t context_length(const LanguageModel& language, const std::string& where) {
  const int64_t positions = language.max_position_embeddings();
  const Json config = language.config();
  const Json window = config.value("sliding_window", Json());
  if (window.is_null() || window.get<int64_t>() >= positions) return positions;
  log_warning(
      "{}: llama.cpp has no sliding window for this decoder; its context is limited to the window, {} of {} "
      "tokens",
      where, window.get<int64_t>(), positions);
  return window.get<int64_t>();
}

GgufFields decoder_fields(const LanguageModel& language, const GgufExportOptions& options,
                          const std::string& where) {
  const Json config = language.config();
  const char* architecture = architecture_of(language).name;
  const std::string prefix = std::string(architecture) + ".";
  GgufFields fields = general_fields(architecture, "model", options);
  const auto add = [&](const char* key, GgufField value) {
    fields.emplace_back(prefix + key, std::move(value));
  };
  add("vocab_size", static_cast<uint32_t>(language.vocab_size()));
  add("context_length", static_cast<uint32_t>(context_length(language, where)));
  add("embedding_length", size_of(config, "hidden_size"));
  add("block_count", size_of(config, "num_hidden_layers"));
  add("feed_forward_length", size_of(config, "intermediate_size"));
  add("attention.head_count", size_of(config, "num_attention_heads"));
  add("attention.head_count_kv", size_of(config, "num_key_value_heads"));
  add("attention.key_length", size_of(config, "head_dim"));
  add("attention.value_length", size_of(config, "head_dim"));
  add("attention.layer_norm_rms_epsilon", config.at("rms_norm_eps").get<float>());
  add_rope(fields, prefix, language);
  fields.insert(fields.end(), options.tokenizer.begin(), options.tokenizer.end());
  return fields;
}

// What llama.cpp divides each rotary frequency by, where "llama3" stretches them one by one.
at::Tensor rope_divisors(const LanguageModel& language) {
  Json config = language.config();
  const int64_t head_dim = config.at("head_dim"), positions = language.max_position_embeddings();
  const at::Tensor stretched = make_rope(config, head_dim, positions).inv_freq;
  config["rope_scaling"] = Json();
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", rope_of(language).at("rope_theta")}};
  return make_rope(config, head_dim, positions).inv_freq / stretched;
}

}  // namespace

std::optional<GgmlType> quantized_ggml_type(const std::string& name) {
  static const std::map<std::string, GgmlType> kTypes = {{"q8_0", GgmlType::kQ8_0},
                                                         {"q4_k_m", GgmlType::kQ4_K},
                                                         {"q5_k_m", GgmlType::kQ5_K},
                                                         {"q6_k", GgmlType::kQ6_K}};
  const auto found = kTypes.find(name);
  return found == kTypes.end() ? std::nullopt : std::optional(found->second);
}

GgmlType mmproj_ggml_type(GgmlType type) { return is_k_type(type) ? GgmlType::kF16 : type; }

GgufFields general_fields(const char* architecture, const char* kind, const GgufExportOptions& options) {
  GgufFields fields = {{"general.architecture", std::string(architecture)},
                       {"general.type", std::string(kind)},
                       {"general.quantization_version", 2u},
                       {"general.file_type", file_type(options.type)}};
  fields.insert(fields.end(), options.general.begin(), options.general.end());
  return fields;
}

GgufTensorToWrite gguf_tensor(const std::string& name, const at::Tensor& values, GgmlType type) {
  GgmlType stored = values.dim() == 1 ? GgmlType::kF32 : type;
  while (values.size(-1) % ggml_block(stored).elements != 0) stored = fallback_of(stored);
  return {name, values.sizes().vec(), stored, [=] { return encode_ggml(values, stored, name); }};
}

void check_gguf_decoder(const LanguageModel& language) {
  architecture_of(language);
  const Json rope = rope_of(language);
  CALDERA_CHECK(rope.value("truncate", true), ConfigError,
                "--format gguf: the decoder's YaRN has \"truncate\": false, which llama.cpp does not know");
}

void save_gguf_decoder(LanguageModel& language, const GgufExportOptions& options,
                       const std::filesystem::path& file) {
  check_gguf_decoder(language);
  const GgufArchitecture& architecture = architecture_of(language);
  const Json config = language.config();
  std::vector<GgufTensorToWrite> tensors;
  if (rope_of(language).at("rope_type") == "llama3")
    tensors.push_back(gguf_tensor("rope_freqs.weight", rope_divisors(language), GgmlType::kF32));
  for (const NamedTensor& named : language.tensors()) {
    const std::string name = gguf_decoder_name(named.name);
    CALDERA_CHECK(!name.empty(), ConfigError,
                  "--format gguf: llama.cpp has no place for the decoder's tensor {}", named.name);
    GgufTensorToWrite tensor =
        gguf_tensor(name, value_of(named, options.values), decoder_type(name, options.type, config));
    const bool is_q = named.name.find(".q_proj.") != std::string::npos;
    const bool is_k = named.name.find(".k_proj.") != std::string::npos;
    if (architecture.rotates_neighbours && (is_q || is_k)) {
      const int64_t heads = config.at(is_q ? "num_attention_heads" : "num_key_value_heads");
      tensor.bytes = [=, type = tensor.type, values = value_of(named, options.values)] {
        return encode_ggml(to_neighbour_order(values, heads), type, name);
      };
    }
    tensors.push_back(std::move(tensor));
  }
  write_gguf(file, decoder_fields(language, options, file.filename().string()), tensors);
}

}  // namespace caldera
