#include "model/weights/gguf_encode.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>
#include <map>

#include "base/error.h"
#include "model/weights/gguf_encode_k.h"

namespace caldera {
namespace {

std::vector<std::byte> bytes_of(const at::Tensor& values) {
  std::vector<std::byte> bytes(values.nbytes());
  std::memcpy(bytes.data(), values.const_data_ptr(), bytes.size());
  return bytes;
}

void pack_q8_0(const float* x, std::byte* out) {
  float largest = 0;
  for (int64_t j = 0; j < kQ8BlockElements; ++j) largest = std::max(largest, std::abs(x[j]));
  const float scale = largest / 127.0f, inverse = scale == 0 ? 0 : 1.0f / scale;
  const c10::Half stored = scale;
  std::memcpy(out, &stored, sizeof stored);
  for (int64_t j = 0; j < kQ8BlockElements; ++j)
    out[2 + j] = static_cast<std::byte>(static_cast<int8_t>(std::round(x[j] * inverse)));
}

using PackBlock = void (*)(const float* x, std::byte* block);
PackBlock packer_of(GgmlType type) {
  static const std::map<GgmlType, PackBlock> kPackers = {
      {GgmlType::kQ5_0, pack_q5_0}, {GgmlType::kQ5_1, pack_q5_1}, {GgmlType::kQ8_0, pack_q8_0},
      {GgmlType::kQ4_K, pack_q4_k}, {GgmlType::kQ5_K, pack_q5_k}, {GgmlType::kQ6_K, pack_q6_k}};
  return kPackers.at(type);
}

std::vector<std::byte> quantize(const at::Tensor& values, GgmlType type) {
  const float* elements = values.const_data_ptr<float>();
  const GgmlBlock block = ggml_block(type);
  const PackBlock pack = packer_of(type);
  std::vector<std::byte> bytes(ggml_bytes(values.sizes().vec(), type));
  at::parallel_for(0, values.numel() / block.elements, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(elements + i * block.elements, bytes.data() + i * block.bytes);
  });
  return bytes;
}

}  // namespace

std::vector<std::byte> encode_ggml(const at::Tensor& values, GgmlType type, const std::string& name) {
  const at::Tensor exact = values.detach().to(at::kCPU, at::kFloat).contiguous();
  if (type == GgmlType::kF32) return bytes_of(exact);
  if (type == GgmlType::kBF16) return bytes_of(exact.to(at::kBFloat16));
  // All other types hold float16 numbers; q8_0's is the largest value's 127th part.
  const bool is_half = type == GgmlType::kF16;
  const std::string type_name = ggml_block(type).name;
  const double largest = exact.abs().max().item<double>();
  const double limit = type == GgmlType::kQ8_0 ? 65504.0 * 127 : 65504.0;
  CALDERA_CHECK(!(std::isfinite(largest) && largest > limit), CheckpointError,
                "{}: a value of {} is beyond {}; export bf16 or f32", name, largest,
                is_half ? "float16" : type_name + "'s float16 scales");
  CALDERA_CHECK(is_half || std::isfinite(largest), CheckpointError,
                "{}: holds values that are not finite, which {} cannot hold", name, type_name);
  return is_half ? bytes_of(exact.to(at::kHalf)) : quantize(exact, type);
}

}  // namespace caldera
