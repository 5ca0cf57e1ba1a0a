// The decoders, each in a file of its own; registry.cpp lists them.
#pragma once
#include "model/language/language_model.h"

namespace caldera {

extern const LanguageModelSpec kLlamaSpec, kMistralSpec, kQwen2Spec, kQwen3Spec;

}  // namespace caldera
