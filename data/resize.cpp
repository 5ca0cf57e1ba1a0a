// Pillow's ImagingResample for 8-bit pictures (src/libImaging/Resample.c): a separable cubic with a = -0.5,
// widened by the scale when shrinking, in 22-bit fixed point, rounded to 8 bits between the passes.
// Equal bit for bit.
#include "data/resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"

// Sanitizers instrument the resolvers that choose a clone, which run before the sanitizer itself is set up.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define CALDERA_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CALDERA_CLONES
#endif

namespace caldera {
namespace {

constexpr int kPrecisionBits = 32 - 8 - 2;
constexpr int64_t kChannels = 3;
constexpr int64_t kBlock =
    32;  // rows (first pass) or values (second pass) handled at once, to fill vector registers

// Where one pass takes its input from: output i sums `num_taps` inputs from first[i] on, weighted by taps[i *
// stride...].
struct Taps {
  std::vector<int64_t> first, num_taps;
  std::vector<int32_t> weights;
  int64_t stride = 0;
};

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// Weights of the outputs [begin, begin + count) of a pass from in_size to out_size.
Taps make_taps(int64_t in_size, int64_t out_size, int64_t begin, int64_t count) {
  const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
  const double filter_scale = std::max(scale, 1.0), support = 2.0 * filter_scale;
  Taps taps;
  taps.stride = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
  taps.weights.assign(static_cast<size_t>(count * taps.stride), 0);
  std::vector<double> weights(static_cast<size_t>(taps.stride));
  for (int64_t i = 0; i < count; ++i) {
    const double center = (static_cast<double>(begin + i) + 0.5) * scale;
    const auto first = static_cast<int64_t>(std::max(center - support + 0.5, 0.0));
    const int64_t last = std::min(static_cast<int64_t>(center + support + 0.5), in_size);
    double sum = 0;
    for (int64_t k = 0; k < last - first; ++k) {
      const double weight = cubic((static_cast<double>(k + first) - center + 0.5) * (1.0 / filter_scale));
      weights[static_cast<size_t>(k)] = weight;
      sum += weight;
    }
    for (int64_t k = 0; k < last - first; ++k) {
      double weight = weights[static_cast<size_t>(k)];
      if (sum != 0.0) weight /= sum;
      weight *= 1 << kPrecisionBits;
      taps.weights[static_cast<size_t>(i * taps.stride + k)] =
          static_cast<int32_t>(weight < 0 ? -0.5 + weight : 0.5 + weight);
    }
    taps.first.push_back(first);
    taps.num_taps.push_back(last - first);
  }
  return taps;
}

inline uint8_t clip8(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255)); }

// One block of kBlock rows, transposed to [X * 3][kBlock] so that neighbouring lanes are neighbouring rows.
CALDERA_CLONES void sum_columns(const uint8_t* __restrict in, const int32_t* __restrict weights,
                                int64_t num_taps, uint8_t* __restrict out) {
  for (int64_t c = 0; c < kChannels; ++c) {
    int32_t sums[kBlock];
    for (int64_t r = 0; r < kBlock; ++r) sums[r] = 1 << (kPrecisionBits - 1);
    for (int64_t k = 0; k < num_taps; ++k) {
      const uint8_t* values = in + (k * kChannels + c) * kBlock;
      const int32_t weight = weights[k];
      for (int64_t r = 0; r < kBlock; ++r) sums[r] += values[r] * weight;
    }
    for (int64_t r = 0; r < kBlock; ++r) out[c * kBlock + r] = clip8(sums[r]);
  }
}

// kBlock neighbouring values of one output row.
CALDERA_CLONES void sum_rows(const uint8_t* __restrict in, int64_t row_stride,
                             const int32_t* __restrict weights, int64_t num_taps, uint8_t* __restrict out) {
  int32_t sums[kBlock];
  for (int64_t i = 0; i < kBlock; ++i) sums[i] = 1 << (kPrecisionBits - 1);
  for (int64_t k = 0; k < num_taps; ++k) {
    const uint8_t* values = in + k * row_stride;
    const int32_t weight = weights[k];
    for (int64_t i = 0; i < kBlock; ++i) sums[i] += values[i] * weight;
  }
  for (int64_t i = 0; i < kBlock; ++i) out[i] = clip8(sums[i]);
}

using Bytes16 = uint8_t __attribute__((vector_size(16)));

// 16 rows of 16 bytes become columns: interleaving the two halves of the rows, four times over.
CALDERA_CLONES void transpose_16(const uint8_t* const* in, uint8_t* const* out) {
  constexpr Bytes16 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Bytes16 high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Bytes16 rows[16], turned[16];
  for (int64_t r = 0; r < 16; ++r) std::memcpy(&rows[r], in[r], 16);
  for (int64_t round = 0; round < 4; ++round) {
    for (int64_t i = 0; i < 8; ++i) {
      turned[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], low);
      turned[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], high);
    }
    std::memcpy(rows, turned, sizeof rows);
  }
  for (int64_t r = 0; r < 16; ++r) std::memcpy(out[r], &rows[r], 16);
}

// out[c * out_stride + r] = in[r * in_stride + c] for all rows r and columns c.
void transpose(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t* out,
               int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      if (r + 16 <= rows && c + 16 <= columns) {
        const uint8_t* from[16];
        uint8_t* to[16];
        for (int64_t i = 0; i < 16; ++i) {
          from[i] = in + (r + i) * in_stride + c;
          to[i] = out + (c + i) * out_stride + r;
        }
        transpose_16(from, to);
        continue;
      }
      for (int64_t i = r; i < std::min(r + 16, rows); ++i)
        for (int64_t j = c; j < std::min(c + 16, columns); ++j)
          out[j * out_stride + i] = in[i * in_stride + j];
    }
  }
}

// Rows [top, top + num_rows) of the picture, resized to taps.first.size() columns; rows of the result are
// out_stride apart.
void resize_columns(const Image& image, int64_t top, int64_t num_rows, const Taps& taps, uint8_t* out,
                    int64_t out_stride) {
  const int64_t in_stride = image.width * kChannels, out_width = static_cast<int64_t>(taps.first.size());
  const int64_t begin = taps.first.front() * kChannels;
  const int64_t end = (taps.first.back() + taps.num_taps.back()) * kChannels;
  std::vector<uint8_t> block(static_cast<size_t>((end - begin) * kBlock));
  std::vector<uint8_t> result(static_cast<size_t>(out_width * kChannels * kBlock));
  for (int64_t row = 0; row < num_rows; row += kBlock) {
    const int64_t rows = std::min(kBlock, num_rows - row);
    transpose(image.pixels.data() + (top + row) * in_stride + begin, in_stride, rows, end - begin,
              block.data(), kBlock);
    for (int64_t x = 0; x < out_width; ++x) {
      const auto tap = static_cast<size_t>(x);
      sum_columns(block.data() + (taps.first[tap] * kChannels - begin) * kBlock,
                  &taps.weights[tap * static_cast<size_t>(taps.stride)], taps.num_taps[tap],
                  result.data() + x * kChannels * kBlock);
    }
    transpose(result.data(), kBlock, out_width * kChannels, rows, out + row * out_stride, out_stride);
  }
}

// Rows of the result are sums over rows of `in`, which are row_stride apart, as are those of `out`. Both
// buffers end in room for one more block, so that the last block of a row may run over; the next row
// overwrites what it left.
void resize_rows(const uint8_t* in, int64_t first_row, int64_t row_stride, const Taps& taps, uint8_t* out) {
  for (size_t y = 0; y < taps.first.size(); ++y)
    for (int64_t i = 0; i < row_stride; i += kBlock)
      sum_rows(in + (taps.first[y] - first_row) * row_stride + i, row_stride,
               &taps.weights[y * static_cast<size_t>(taps.stride)], taps.num_taps[y],
               out + static_cast<int64_t>(y) * row_stride + i);
}

// Pillow 13 begins with the pass that leaves less to do: the vertical one where it takes away more than twice
// as much as the horizontal one. (Rounding to 8 bits in between makes the order visible. Releases before
// always began with rows.)
bool is_vertical_first(const Image& image, int64_t height, int64_t width) {
  return image.height > height && image.height - height > 2 * (image.width - width);
}

}  // namespace

Image resize_bicubic_window(const Image& image, int64_t height, int64_t width, const Window& window) {
  CALDERA_ASSERT(image.height > 0 && image.width > 0 && height > 0 && width > 0);
  CALDERA_ASSERT(window.top >= 0 && window.left >= 0 && window.height > 0 && window.width > 0);
  CALDERA_ASSERT(window.top + window.height <= height && window.left + window.width <= width);
  const Taps rows = make_taps(image.height, height, window.top, window.height);
  const Taps columns = make_taps(image.width, width, window.left, window.width);
  const int64_t in_stride = image.width * kChannels, out_stride = window.width * kChannels;
  const auto buffer = [](int64_t num_rows, int64_t stride) {
    return std::vector<uint8_t>(static_cast<size_t>(num_rows * stride + kBlock));
  };
  Image out{window.height, window.width, buffer(window.height, out_stride)};
  if (is_vertical_first(image, height, width)) {
    std::vector<uint8_t> padded = image.pixels;
    padded.resize(padded.size() + kBlock);
    Image lowered{window.height, image.width, buffer(window.height, in_stride)};
    resize_rows(padded.data(), 0, in_stride, rows, lowered.pixels.data());
    resize_columns(lowered, 0, window.height, columns, out.pixels.data(), out_stride);
  } else {
    const int64_t first_row = rows.first.front(),
                  num_rows = rows.first.back() + rows.num_taps.back() - first_row;
    std::vector<uint8_t> narrowed = buffer(num_rows, out_stride);
    resize_columns(image, first_row, num_rows, columns, narrowed.data(), out_stride);
    resize_rows(narrowed.data(), first_row, out_stride, rows, out.pixels.data());
  }
  out.pixels.resize(static_cast<size_t>(window.height * out_stride));
  return out;
}

Image resize_bicubic(const Image& image, int64_t height, int64_t width) {
  return resize_bicubic_window(image, height, width, {0, 0, height, width});
}

}  // namespace caldera
