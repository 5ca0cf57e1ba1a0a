// What the decoders of the Llama family share (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions,
// grouped-query attention, SwiGLU. A family is one file that reads its config.json into a DecoderConfig.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "model/language/language_model.h"
#include "model/language/rope.h"

namespace caldera {

struct DecoderConfig {
  const char* id = "";  // the family's
  int64_t vocab_size = 0, hidden_size = 0, intermediate_size = 0, num_hidden_layers = 0,
          num_attention_heads = 0, num_key_value_heads = 0, head_dim = 0, max_position_embeddings = 0;
  double rms_norm_eps = 1e-6, initializer_range = 0.02;
  bool qkv_bias = false, o_bias = false, mlp_bias = false;
  bool qk_norm = false;  // RMSNorm of each head's query and key, before the rotary embedding
  bool tie_word_embeddings = false;
  std::vector<int64_t>
      windows;  // a layer each: how many tokens a query sees, its own included; 0: all before it
  Rope rope;
  Json json;  // config.json as it is written
};

// Reads a family's config.json; names the family and the key in messages.
class ConfigReader {
 public:
  ConfigReader(const Json& json, const char* family) : json_(json), family_(family) {}
  bool has(const char* key) const;                                // and it is not null
  int64_t positive(const char* key, int64_t fallback = 0) const;  // fallback 0: required
  double number(const char* key, double fallback) const;
  bool flag(const char* key, bool fallback) const;
  // The sizes, norms and rotary frequencies that every family names alike, and their part of `json`.
  // `architecture` is HF's class. The family's defaults where it has others than Llama: set before, in
  // `config`.
  void read_common(DecoderConfig& config, const char* architecture) const;
  // Qwen's sliding windows: "use_sliding_window", "sliding_window", and "layer_types" ("full_attention" or
  // "sliding_attention" a layer) or "max_window_layers", the first layer that slides.
  void read_sliding(DecoderConfig& config) const;

 private:
  const Json& json_;
  const char* family_;
};

// LanguageModelSpec::class_defaults: apart from these two, transformers' configuration classes agree.
Json class_sizes(int64_t vocab_size, int64_t intermediate_size);
std::unique_ptr<LanguageModel> make_decoder(DecoderConfig config);
// HF's initialisation: normal(0, initializer_range), norms 1, biases 0.
void init_decoder(LanguageModel& model, uint64_t seed);

}  // namespace caldera
