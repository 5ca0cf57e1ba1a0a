// What the decoder's file and the tower's have in common.
#pragma once
#include <string>

#include "model/weights/gguf_export.h"

namespace caldera {

// "general.architecture" and its companions, then the options' own.
GgufFields general_fields(const char* architecture, const char* kind, const GgufExportOptions& options);
// A tensor in the wanted type: vectors in float32; rows that are no whole blocks in the type it falls back
// to.
GgufTensorToWrite gguf_tensor(const std::string& name, const at::Tensor& values, GgmlType type);

}  // namespace caldera
