#include "model/ops/cuda/device.cuh"

namespace caldera::CALDERA_KERNELS {
namespace {

struct PixelScale {
  float scale[3], shift[3];
};

// A block takes a patch.
template <class T>
__global__ void normalized_patches_kernel(const uint8_t* pixels, T* patches, unsigned size, unsigned patch,
                                          unsigned grid, PixelScale by) {
  const unsigned image = blockIdx.x / (grid * grid), place = blockIdx.x % (grid * grid);
  const unsigned top = place / grid * patch, left = place % grid * patch, width = 3 * patch * patch;
  pixels += static_cast<int64_t>(image) * 3 * size * size;
  patches += static_cast<int64_t>(blockIdx.x) * width;
  for (unsigned i = threadIdx.x; i < width; i += kThreads) {
    const unsigned channel = i / (patch * patch), y = i / patch % patch, x = i % patch;
    const float pixel = pixels[(channel * size + top + y) * size + left + x];
    store(patches + i, Floats<1>{pixel * by.scale[channel] + by.shift[channel]});
  }
}

}  // namespace

template <class T>
void normalized_patches(const uint8_t* pixels, T* patches, int64_t num_images, int64_t size, int64_t patch,
                        const std::array<float, 3>& scale, const std::array<float, 3>& shift, Stream stream) {
  const int64_t grid = size / patch;
  launch("normalized_patches", normalized_patches_kernel<T>, num_images * grid * grid, stream, pixels,
         patches, static_cast<unsigned>(size), static_cast<unsigned>(patch), static_cast<unsigned>(grid),
         PixelScale{{scale[0], scale[1], scale[2]}, {shift[0], shift[1], shift[2]}});
}

template void normalized_patches(const uint8_t*, float*, int64_t, int64_t, int64_t,
                                 const std::array<float, 3>&, const std::array<float, 3>&, Stream);
template void normalized_patches(const uint8_t*, Bf16*, int64_t, int64_t, int64_t,
                                 const std::array<float, 3>&, const std::array<float, 3>&, Stream);

}  // namespace caldera::CALDERA_KERNELS
