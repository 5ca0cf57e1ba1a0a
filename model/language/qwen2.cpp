// Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): transformers' Qwen2ForCausalLM. Biases on q, k and v.
#include "model/language/decoder.h"
#include "model/language/families.h"

namespace caldera {
namespace {

std::unique_ptr<LanguageModel> make_qwen2(const Json& json) {
  const ConfigReader reader(json, "qwen2");
  DecoderConfig config;
  config.num_key_value_heads = 32;  // transformers' defaults
  config.max_position_embeddings = 32768;
  reader.read_common(config, "Qwen2ForCausalLM");
  config.qkv_bias = true;
  reader.read_sliding(config);
  return make_decoder(std::move(config));
}

}  // namespace

const LanguageModelSpec kQwen2Spec = {.id = "qwen2",
                                      .model_types = {"qwen2"},
                                      .gguf_architectures = {"qwen2"},
                                      .make = make_qwen2,
                                      .init = init_decoder,
                                      .class_defaults = class_sizes(151936, 22016)};

}  // namespace caldera
