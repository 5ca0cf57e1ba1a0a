// A packed micro-batch: what the loader makes and the model consumes.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace caldera {

// T tokens of S samples in one row, without padding. Legend: T tokens (image tokens included), S samples,
// K supervised positions, I images, P tokens of one image, Y/X pixels.
struct PackedBatch {
  at::Tensor input_ids_T;             // int64; kImageTokenIndex at each image token
  at::Tensor position_ids_T;          // int64; restarts at 0 with each sample
  std::vector<int64_t> cu_seqlens;    // S + 1 row offsets: sample s is [cu_seqlens[s], cu_seqlens[s + 1])
  at::Tensor supervised_K;            // int64; ascending rows whose *next* token is supervised
  at::Tensor targets_K;               // int64; that next token
  std::vector<int64_t> num_supervised;  // S; how many of the K belong to each sample
  at::Tensor image_rows_IP;           // int64 [I * P]; rows that take image features, in the images' order
  at::Tensor pixels_ICYX;             // uint8 RGB [I, 3, Y, X]; I may be 0
  std::vector<std::string> sample_ids;  // S; for messages and logs
  std::vector<int64_t> sample_numbers;  // S; places in the step, whoever has got them; empty outside of training

  int64_t num_samples() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  int64_t num_tokens() const { return cu_seqlens.empty() ? 0 : cu_seqlens.back(); }
  int64_t num_images() const { return pixels_ICYX.defined() ? pixels_ICYX.size(0) : 0; }
  // A copy whose tensors are on the device (the same tensors where they already are).
  PackedBatch to(at::Device device) const;
};

}  // namespace caldera
