// Mistral 7B (Jiang et al., arXiv 2310.06825): transformers' MistralForCausalLM. In GGUF files it is a llama.
#include "model/language/decoder.h"
#include "model/language/families.h"

namespace caldera {
namespace {

std::unique_ptr<LanguageModel> make_mistral(const Json& json) {
  const ConfigReader reader(json, "mistral");
  DecoderConfig config;
  config.num_key_value_heads = 8;  // transformers' defaults
  config.max_position_embeddings = 4096 * 32;
  reader.read_common(config, "MistralForCausalLM");
  const bool slides = reader.has("sliding_window") || !json.contains("sliding_window");
  const int64_t window = slides ? reader.positive("sliding_window", 4096) : 0;
  config.windows.assign(static_cast<size_t>(config.num_hidden_layers), window);
  config.json["sliding_window"] = slides ? Json(window) : Json();
  return make_decoder(std::move(config));
}

}  // namespace

const LanguageModelSpec kMistralSpec = {.id = "mistral",
                                        .model_types = {"mistral"},
                                        .gguf_architectures = {},
                                        .make = make_mistral,
                                        .init = init_decoder,
                                        .class_defaults = class_sizes(32000, 14336)};

}  // namespace caldera
