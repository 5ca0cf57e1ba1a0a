// The pickle of a dictionary of tensors, read without running anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/aten.h"

namespace caldera {

// A view into a storage, checked against the number of elements that the storage claims.
struct PickledTensor {
  std::string storage;  // the key of its storage
  at::ScalarType type = at::kFloat;
  int64_t storage_elements = 0;
  int64_t offset = 0;  // in elements
  std::vector<int64_t> shape, strides;
};

// Reads a pickle of protocol 2 whose value is a dictionary from names to tensors. Throws CheckpointError
// "FILE: ..." for anything else. What it takes in memory is bounded by the pickle's size (40 bytes a byte).
std::map<std::string, PickledTensor> read_tensor_pickle(std::span<const std::byte> pickle,
                                                        const std::string& file);

}  // namespace caldera
