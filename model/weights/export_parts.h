// What the exports of whole models have in common.
#pragma once

#include <cstdint>

#include "base/aten.h"
#include "base/json.h"

namespace caldera {

// config.json's "dtype": "float32", "bfloat16" or "float16"; throws Error for others.
const char* dtype_name(at::ScalarType dtype);
// bos_token_id, eos_token_id and pad_token_id, of those that the tokenizer has; of others the config keeps what it says.
void put_special_ids(Json& config, int64_t bos, int64_t eos, int64_t pad);

}  // namespace caldera
