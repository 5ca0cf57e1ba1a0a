// The Llama family's decoder (Touvron et al., arXiv 2302.13971, and what followed with the same
// architecture): RMSNorm, rotary positions, grouped-query attention, SwiGLU.
#pragma once
#include "model/language/language_model.h"

namespace caldera {

extern const LanguageModelSpec kLlamaSpec;

}  // namespace caldera
