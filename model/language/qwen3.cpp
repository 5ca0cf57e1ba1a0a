// Qwen3 (arXiv 2505.09388), dense: transformers' Qwen3ForCausalLM. Queries and keys are normed head by head;
// the heads' width is a number of its own.
#include "model/language/decoder.h"
#include "model/language/families.h"

namespace caldera {
namespace {

std::unique_ptr<LanguageModel> make_qwen3(const Json& json) {
  const ConfigReader reader(json, "qwen3");
  DecoderConfig config;
  config.num_key_value_heads = 32;  // transformers' defaults
  config.head_dim = 128;
  config.max_position_embeddings = 32768;
  reader.read_common(config, "Qwen3ForCausalLM");
  config.qkv_bias = config.o_bias = reader.flag("attention_bias", false);
  config.qk_norm = true;
  config.json["attention_bias"] = config.qkv_bias;
  reader.read_sliding(config);
  return make_decoder(std::move(config));
}

}  // namespace

const LanguageModelSpec kQwen3Spec = {.id = "qwen3",
                                      .model_types = {"qwen3"},
                                      .gguf_architectures = {"qwen3"},
                                      .make = make_qwen3,
                                      .init = init_decoder,
                                      .class_defaults = class_sizes(151936, 22016)};

}  // namespace caldera
