// Pillow's ImagingResample for 8-bit pictures (src/libImaging/Resample.c): a separable cubic with a = -0.5,
// widened by the scale when shrinking, in 22-bit fixed point, rounded to 8 bits between the passes.
// Equal bit for bit.
#include "data/resize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "base/aten.h"
#include "base/error.h"
#include "base/simd_level.h"

namespace caldera {
namespace {

constexpr int kPrecisionBits = 32 - 8 - 2;
constexpr int32_t kHalf = 1 << (kPrecisionBits - 1);
constexpr int64_t kChannels = 3;
constexpr int64_t kRows = 16;  // that are turned into columns at once

using Bytes = uint8_t __attribute__((vector_size(16)));
template <class V>
using IntsOf = typename simd::TypesOf<V>::Ints;
using Buffer = std::unique_ptr<uint8_t[]>;

Buffer make_buffer(int64_t num_bytes) {
  return std::make_unique_for_overwrite<uint8_t[]>(static_cast<size_t>(num_bytes));
}

// Where one pass takes its input from: output i sums num_taps[i] inputs from first[i] on, weighted by
// weights[i * stride ...]. Inputs beside the picture all have the frame's colour; outside[i] is their weight.
struct Taps {
  std::vector<int64_t> first, num_taps;
  std::vector<int32_t> weights, outside;
  int64_t stride = 0;

  int64_t size() const { return static_cast<int64_t>(first.size()); }
  int64_t begin() const { return first.front(); }
  int64_t end() const { return first.back() + num_taps.back(); }
};

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// Weights of the outputs [begin, begin + count) of a pass from in_size to out_size, where the picture makes
// up [offset, offset + size) of the input.
Taps make_taps(int64_t in_size, int64_t out_size, int64_t begin, int64_t count, int64_t offset,
               int64_t size) {
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
    const int64_t first_inside = std::clamp(first - offset, int64_t{0}, size);
    const int64_t last_inside = std::clamp(last - offset, int64_t{0}, size);
    int32_t outside = 0;
    for (int64_t k = 0; k < last - first; ++k) {
      double weight = weights[static_cast<size_t>(k)];
      if (sum != 0.0) weight /= sum;
      weight *= 1 << kPrecisionBits;
      const auto fixed = static_cast<int32_t>(weight < 0 ? -0.5 + weight : 0.5 + weight);
      const int64_t place = k + first - offset;
      if (place >= first_inside && place < last_inside)
        taps.weights[static_cast<size_t>(i * taps.stride + place - first_inside)] = fixed;
      else
        outside += fixed;
    }
    taps.first.push_back(first_inside);
    taps.num_taps.push_back(last_inside - first_inside);
    taps.outside.push_back(outside);
  }
  return taps;
}

// One by one, which the compiler makes one instruction of.
template <class V>
CALDERA_INLINE IntsOf<V> widen(const uint8_t* values) {
  IntsOf<V> wide = {};
  for (int64_t i = 0; i < simd::kLanesOf<V>; ++i) wide[i] = values[i];
  return wide;
}

template <class V>
CALDERA_INLINE void store_clipped(uint8_t* values, const IntsOf<V>& sums) {
  using Ints = IntsOf<V>;
  const Ints rounded = sums >> kPrecisionBits;
  const Ints positive = rounded > 0 ? rounded : Ints{};
  const Ints clipped = positive > 255 ? Ints{} + 255 : positive;
  const auto bytes = __builtin_convertvector(clipped, typename simd::TypesOf<V>::Bytes);
  std::memcpy(values, &bytes, sizeof bytes);
}

// [X * 3][kRows] -> [3][X'][kRows].
template <class V>
CALDERA_INLINE void sum_columns(const uint8_t* __restrict block, const Taps& taps,
                                const std::array<uint8_t, 3>& colour, uint8_t* __restrict result) {
  using Ints = IntsOf<V>;
  const int64_t out_width = taps.size();
  for (int64_t x = 0; x < out_width; ++x) {
    const auto tap = static_cast<size_t>(x);
    const uint8_t* first = block + (taps.first[tap] - taps.begin()) * kChannels * kRows;
    const int32_t* weights = &taps.weights[tap * static_cast<size_t>(taps.stride)];
    const int64_t num_taps = taps.num_taps[tap];
    for (int64_t row = 0; row < kRows; row += simd::kLanesOf<V>) {
      const uint8_t* in = first + row;
      Ints red = Ints{} + (kHalf + taps.outside[tap] * colour[0]);
      Ints green = Ints{} + (kHalf + taps.outside[tap] * colour[1]);
      Ints blue = Ints{} + (kHalf + taps.outside[tap] * colour[2]);
      for (int64_t k = 0; k < num_taps; ++k, in += kChannels * kRows) {
        red += widen<V>(in) * weights[k];
        green += widen<V>(in + kRows) * weights[k];
        blue += widen<V>(in + 2 * kRows) * weights[k];
      }
      store_clipped<V>(result + x * kRows + row, red);
      store_clipped<V>(result + (out_width + x) * kRows + row, green);
      store_clipped<V>(result + (2 * out_width + x) * kRows + row, blue);
    }
  }
}

// `count` values of one output row, each a sum over rows of `in`, from `start` on.
template <class V>
CALDERA_INLINE void sum_rows(const uint8_t* __restrict in, int64_t row_stride,
                             const int32_t* __restrict weights, int64_t num_taps, int32_t start,
                             int64_t count, uint8_t* __restrict out) {
  using Ints = IntsOf<V>;
  constexpr int64_t kLanes = simd::kLanesOf<V>, kBlock = 4 * kLanes;
  if (count < kBlock) {
    for (int64_t i = 0; i < count; ++i) {
      int32_t sum = start;
      for (int64_t k = 0; k < num_taps; ++k) sum += in[k * row_stride + i] * weights[k];
      out[i] = static_cast<uint8_t>(std::clamp(sum >> kPrecisionBits, 0, 255));
    }
    return;
  }
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t i = std::min(begin, count - kBlock);  // the last block begins within the one before
    Ints a = Ints{} + start, b = a, c = a, d = a;
    for (int64_t k = 0; k < num_taps; ++k) {
      const uint8_t* values = in + k * row_stride + i;
      a += widen<V>(values) * weights[k];
      b += widen<V>(values + kLanes) * weights[k];
      c += widen<V>(values + 2 * kLanes) * weights[k];
      d += widen<V>(values + 3 * kLanes) * weights[k];
    }
    store_clipped<V>(out + i, a);
    store_clipped<V>(out + i + kLanes, b);
    store_clipped<V>(out + i + 2 * kLanes, c);
    store_clipped<V>(out + i + 3 * kLanes, d);
  }
}

// 16 rows of 16 bytes become columns: interleaving the two halves of the rows, four times over.
CALDERA_INLINE void transpose_16(Bytes (&rows)[kRows]) {
  constexpr Bytes low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Bytes high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  Bytes turned[kRows];
  for (int64_t round = 0; round < 4; ++round) {
    for (int64_t i = 0; i < 8; ++i) {
      turned[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], low);
      turned[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], high);
    }
    std::memcpy(rows, turned, sizeof rows);
  }
}

// lanes[i][r] = rows[r][i], for `count` values of each row.
CALDERA_INLINE void rows_to_lanes(const uint8_t* const* rows, int64_t count, uint8_t* lanes) {
  if (count < kRows) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t r = 0; r < kRows; ++r) lanes[i * kRows + r] = rows[r][i];
    return;
  }
  for (int64_t begin = 0; begin < count; begin += kRows) {
    const int64_t i = std::min(begin, count - kRows);
    Bytes tile[kRows];
    for (int64_t r = 0; r < kRows; ++r) std::memcpy(&tile[r], rows[r] + i, kRows);
    transpose_16(tile);
    std::memcpy(lanes + i * kRows, tile, sizeof tile);
  }
}

// rows[r][i] = lanes[i][r].
CALDERA_INLINE void lanes_to_rows(const uint8_t* lanes, int64_t count, uint8_t* const* rows) {
  if (count < kRows) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t r = 0; r < kRows; ++r) rows[r][i] = lanes[i * kRows + r];
    return;
  }
  for (int64_t begin = 0; begin < count; begin += kRows) {
    const int64_t i = std::min(begin, count - kRows);
    Bytes tile[kRows];
    std::memcpy(tile, lanes + i * kRows, sizeof tile);
    transpose_16(tile);
    for (int64_t r = 0; r < kRows; ++r) std::memcpy(rows[r] + i, &tile[r], kRows);
  }
}

// num_rows rows of RGB from `in` on, in_stride apart, become rows of three planes: channel_stride from one
// channel to the next, row_stride from one row to the next. A last block of fewer than kRows rows repeats
// its last row, and writes it as often.
void resize_columns(const uint8_t* in, int64_t in_stride, int64_t num_rows, const Taps& taps,
                    const std::array<uint8_t, 3>& colour, uint8_t* out, int64_t channel_stride,
                    int64_t row_stride) {
  const int64_t begin = taps.begin() * kChannels, count = taps.end() * kChannels - begin;
  const Buffer block = make_buffer(count * kRows), result = make_buffer(taps.size() * kChannels * kRows);
  for (int64_t row = 0; row < num_rows; row += kRows) {
    const uint8_t* from[kRows];
    for (int64_t r = 0; r < kRows; ++r) from[r] = in + std::min(row + r, num_rows - 1) * in_stride + begin;
    simd::run<rows_to_lanes>(from, count, block.get());
    simd::run<CALDERA_EACH_WIDTH(sum_columns)>(block.get(), taps, colour, result.get());
    for (int64_t c = 0; c < kChannels; ++c) {
      uint8_t* to[kRows];
      for (int64_t r = 0; r < kRows; ++r)
        to[r] = out + c * channel_stride + std::min(row + r, num_rows - 1) * row_stride;
      simd::run<lanes_to_rows>(result.get() + c * taps.size() * kRows, taps.size(), to);
    }
  }
}

// Rows of `count` values, in_stride apart from row taps.begin() on, become rows out_stride apart.
void resize_rows(const uint8_t* in, int64_t in_stride, const Taps& taps, uint8_t colour, int64_t count,
                 uint8_t* out, int64_t out_stride) {
  for (int64_t y = 0; y < taps.size(); ++y) {
    const auto tap = static_cast<size_t>(y);
    simd::run<CALDERA_EACH_WIDTH(sum_rows)>(in + (taps.first[tap] - taps.begin()) * in_stride, in_stride,
                                            &taps.weights[tap * static_cast<size_t>(taps.stride)],
                                            taps.num_taps[tap], kHalf + taps.outside[tap] * colour, count,
                                            out + y * out_stride);
  }
}

// Pillow 13 begins with the pass that leaves less to do: the vertical one where it takes away more than twice
// as much as the horizontal one. (Rounding to 8 bits in between makes the order visible. Releases before
// always began with rows.)
bool is_vertical_first(const Frame& frame, int64_t height, int64_t width) {
  return frame.height > height && frame.height - height > 2 * (frame.width - width);
}

}  // namespace

at::Tensor resize_bicubic(const Image& image, const Frame& frame, int64_t height, int64_t width,
                          const Window& window) {
  CALDERA_ASSERT(image.height > 0 && image.width > 0 && height > 0 && width > 0);
  CALDERA_ASSERT(frame.top >= 0 && frame.left >= 0 && frame.top + image.height <= frame.height &&
                 frame.left + image.width <= frame.width);
  CALDERA_ASSERT(window.top >= 0 && window.left >= 0 && window.height > 0 && window.width > 0);
  CALDERA_ASSERT(window.top + window.height <= height && window.left + window.width <= width);
  const Taps rows = make_taps(frame.height, height, window.top, window.height, frame.top, image.height);
  const Taps columns = make_taps(frame.width, width, window.left, window.width, frame.left, image.width);
  const int64_t num_rows = rows.end() - rows.begin(), in_stride = image.width * kChannels;
  const uint8_t* in = image.pixels.data() + rows.begin() * in_stride;
  at::Tensor out_CYX = at::empty({kChannels, window.height, window.width}, at::kByte);
  auto* out = out_CYX.data_ptr<uint8_t>();
  const int64_t plane = window.height * window.width;
  if (is_vertical_first(frame, height, width)) {
    CALDERA_ASSERT(frame.height == image.height);  // rows of RGB have no one value beside the picture
    const Buffer lowered = make_buffer(window.height * in_stride);
    resize_rows(in, in_stride, rows, 0, in_stride, lowered.get(), in_stride);
    resize_columns(lowered.get(), in_stride, window.height, columns, frame.colour, out, plane, window.width);
  } else {
    const int64_t out_stride = window.width * kChannels;
    const Buffer narrowed = make_buffer(num_rows * out_stride);
    resize_columns(in, in_stride, num_rows, columns, frame.colour, narrowed.get(), window.width, out_stride);
    for (int64_t c = 0; c < kChannels; ++c)
      resize_rows(narrowed.get() + c * window.width, out_stride, rows, frame.colour[static_cast<size_t>(c)],
                  window.width, out + c * plane, window.width);
  }
  return out_CYX;
}

}  // namespace caldera
