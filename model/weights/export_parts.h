// What the exports of whole models have in common.
#pragma once

#include <cstdint>

#include "base/aten.h"
#include "base/json.h"
#include "model/language/language_model.h"

namespace caldera {

// config.json's "dtype": "float32", "bfloat16" or "float16"; throws Error for others.
const char* dtype_name(at::ScalarType dtype);
// bos_token_id, eos_token_id and pad_token_id, of those that the tokenizer has; of others the config keeps
// what it says, and a list of end tokens gains the tokenizer's.
void put_special_ids(Json& config, int64_t bos, int64_t eos, int64_t pad);
// What generation_config.json holds, with the decoder's list of end tokens where it has one.
Json generation_config(const LanguageModel& language, int64_t bos, int64_t eos, int64_t pad);

}  // namespace caldera
