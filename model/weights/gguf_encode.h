// A tensor's elements as ggml stores them.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "base/aten.h"
#include "base/gguf_writer.h"

namespace caldera {

// Elements of a float tensor in ggml's type: rounded to nearest, q8_0 in blocks of 32 as ggml's own quantiser
// makes them (scale max|x| / 127 as float16, then round(x / scale), halves away from zero), which the `gguf`
// package reproduces bit for bit; q5_0, q5_1 and the "K" types as ggml's quantisers without an importance
// matrix. Throws CheckpointError naming the tensor where a value that is finite is not in the type.
std::vector<std::byte> encode_ggml(const at::Tensor& values, GgmlType type, const std::string& name);

}  // namespace caldera
