// Where an export takes a model's values from: the model itself, or the files behind it (mapped_model.h).
#pragma once

#include <functional>

#include "base/aten.h"
#include "model/module.h"

namespace caldera {

// Empty: NamedTensor::value().
using TensorValues = std::function<at::Tensor(const NamedTensor&)>;

inline at::Tensor value_of(const NamedTensor& named, const TensorValues& values) {
  return values ? values(named) : named.value();
}

}  // namespace caldera
