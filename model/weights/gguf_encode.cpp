#include "model/weights/gguf_encode.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>

#include "base/error.h"

namespace caldera {
namespace {

std::vector<std::byte> bytes_of(const at::Tensor& values) {
  std::vector<std::byte> bytes(values.nbytes());
  std::memcpy(bytes.data(), values.const_data_ptr(), bytes.size());
  return bytes;
}

void quantize_block(const float* x, std::byte* out) {
  float largest = 0;
  for (int64_t j = 0; j < kQ8BlockElements; ++j) largest = std::max(largest, std::abs(x[j]));
  const float scale = largest / 127.0f, inverse = scale == 0 ? 0 : 1.0f / scale;
  const c10::Half stored = scale;
  std::memcpy(out, &stored, sizeof stored);
  for (int64_t j = 0; j < kQ8BlockElements; ++j)
    out[2 + j] = static_cast<std::byte>(static_cast<int8_t>(std::round(x[j] * inverse)));
}

std::vector<std::byte> quantize_q8(const at::Tensor& values) {
  const float* elements = values.const_data_ptr<float>();
  std::vector<std::byte> bytes(ggml_bytes(values.sizes().vec(), GgmlType::kQ8_0));
  at::parallel_for(0, values.numel() / kQ8BlockElements, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      quantize_block(elements + i * kQ8BlockElements, bytes.data() + i * kQ8BlockBytes);
  });
  return bytes;
}

}  // namespace

std::vector<std::byte> encode_ggml(const at::Tensor& values, GgmlType type, const std::string& name) {
  const at::Tensor exact = values.detach().to(at::kCPU, at::kFloat).contiguous();
  if (type == GgmlType::kF32) return bytes_of(exact);
  if (type == GgmlType::kBF16) return bytes_of(exact.to(at::kBFloat16));
  // Both other types hold a float16.
  const double largest = exact.abs().max().item<double>();
  const double limit = type == GgmlType::kQ8_0 ? 65504.0 * 127 : 65504.0;
  CALDERA_CHECK(!(std::isfinite(largest) && largest > limit), CheckpointError,
                "{}: a value of {} is beyond {}; export bf16 or f32", name, largest,
                type == GgmlType::kQ8_0 ? "q8_0's float16 scales" : "float16");
  CALDERA_CHECK(type != GgmlType::kQ8_0 || std::isfinite(largest), CheckpointError,
                "{}: holds values that are not finite, which q8_0 cannot hold", name);
  return type == GgmlType::kF16 ? bytes_of(exact.to(at::kHalf)) : quantize_q8(exact);
}

}  // namespace caldera
