#include "base/error.h"
#include "base/strings.h"
#include "model/language/families.h"

namespace caldera {

std::span<const LanguageModelSpec> language_models() {
  static const std::vector<LanguageModelSpec> models = {kLlamaSpec, kMistralSpec, kQwen2Spec, kQwen3Spec};
  return models;
}

const LanguageModelSpec& find_language_model(const std::string& model_type, const std::string& where) {
  std::vector<std::string> known;
  for (const LanguageModelSpec& spec : language_models()) {
    for (const std::string& type : spec.model_types) {
      if (type == model_type) return spec;
      known.push_back(type);
    }
  }
  throw CheckpointError(fmt::format("{}: language model type \"{}\" is not known{}", where, model_type,
                                    suggestion(model_type, known)));
}

}  // namespace caldera
