// What the exports of whole models have in common.
#pragma once
#include <ATen/ATen.h>

namespace caldera {

// config.json's "dtype": "float32", "bfloat16" or "float16"; throws Error for others.
const char* dtype_name(at::ScalarType dtype);

}  // namespace caldera
