// LLaMA (Touvron et al., arXiv 2302.13971), Vicuna, SmolLM2 and others of transformers' LlamaForCausalLM.
#include "model/language/decoder.h"
#include "model/language/families.h"

namespace caldera {
namespace {

std::unique_ptr<LanguageModel> make_llama(const Json& json) {
  const ConfigReader reader(json, "llama");
  DecoderConfig config;
  reader.read_common(config, "LlamaForCausalLM");
  const bool attention_bias = reader.flag("attention_bias", false);
  config.qkv_bias = config.o_bias = attention_bias;
  config.mlp_bias = reader.flag("mlp_bias", false);
  config.json["attention_bias"] = attention_bias;
  config.json["mlp_bias"] = config.mlp_bias;
  return make_decoder(std::move(config));
}

}  // namespace

const LanguageModelSpec kLlamaSpec = {.id = "llama",
                                      .model_types = {"llama"},
                                      .gguf_architectures = {"llama"},
                                      .make = make_llama,
                                      .init = init_decoder,
                                      .class_defaults = class_sizes(32000, 11008)};

}  // namespace caldera
