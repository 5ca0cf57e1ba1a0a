#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {

struct Nf4Values {
  float values[16];
};

namespace {

constexpr int kElementsPerScale = 64, kScalesPerGroup = 256;

// A thread takes kN elements, of one block: those of a warp lie side by side.
template <class T, int kN>
__global__ void dequantize_nf4_kernel(const uint8_t* codes, Nf4Scales scales, Nf4Values table, T* out,
                                      int64_t count) {
  // As many banks of memory as values: no two threads get in each other's way.
  __shared__ float values[16];
  if (threadIdx.x < 16) values[threadIdx.x] = table.values[threadIdx.x];
  __syncthreads();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN;
  if (i >= count) return;
  const int64_t block = i / kElementsPerScale;
  const float scale =
      scales.scale
          ? scales.scale[block]
          : scales.map[scales.codes[block]] * scales.group_scale[block / kScalesPerGroup] + scales.offset;
  Floats<kN> result;
  if constexpr (kN == 1) {
    const uint8_t byte = codes[i / 2];
    result[0] = values[i % 2 == 0 ? byte >> 4 : byte & 15] * scale;
  } else {
    const Pack<uint8_t, kN / 2> bytes = pack_at<kN / 2>(codes + i / 2);
    CALDERA_UNROLL
    for (int k = 0; k < kN; ++k)
      result[k] = values[k % 2 == 0 ? bytes.values[k / 2] >> 4 : bytes.values[k / 2] & 15] * scale;
  }
  store(out + i, result);
}

}  // namespace

template <class T>
void dequantize_nf4(const uint8_t* codes, const Nf4Scales& scales, const std::array<float, 16>& values,
                    T* out, int64_t count, Stream stream) {
  Nf4Values table;
  for (size_t i = 0; i < values.size(); ++i) table.values[i] = values[i];
  with_lanes<T>(
      count,
      [&](auto lanes) {
        launch("dequantize_nf4", dequantize_nf4_kernel<T, lanes.value>,
               ceil_div(count, kThreads * lanes.value), stream, codes, scales, table, out, count);
      },
      codes, out);
}

template void dequantize_nf4(const uint8_t*, const Nf4Scales&, const std::array<float, 16>&, float*, int64_t,
                             Stream);
template void dequantize_nf4(const uint8_t*, const Nf4Scales&, const std::array<float, 16>&, Bf16*, int64_t,
                             Stream);

}  // namespace caldera::CALDERA_KERNELS
