// The CUDA kernels of the operations, one .cu file for each, without a header of ATen or CUDA: pointers to
// the device's memory, sizes, and the stream on which the work is queued (nothing here waits for it). Numbers
// are those of the CPU kernels: everything computes in float32, bfloat16 is rounded to nearest even on
// storing. T is float or Bf16. Tensors are dense, a row after another, unless a stride is given; any width
// and any alignment is taken, and a multiple of 16 bytes is fastest. Throws caldera::Error if a launch fails.
#pragma once
#include <array>
#include <cstdint>

#include "model/ops/code_tables.h"
#include "model/ops/noise_words.h"

// The tests compile the same sources for the CPU, under another name.
#ifndef CALDERA_KERNELS
#define CALDERA_KERNELS cuda
#endif

struct CUstream_st;

namespace caldera::CALDERA_KERNELS {

using Stream = ::CUstream_st*;  // cudaStream_t
struct Bf16 {
  uint16_t bits;
};

// y = x * rstd * weight, rstd [rows] = 1 / sqrt(mean(x^2) + eps). `update` and `sum`: null, or x + update is written to
// `sum` and takes x's place.
template <class T>
void rms_norm_forward(const T* x, const T* update, const T* weight, T* sum, T* y, float* rstd, int64_t rows, int64_t width,
                      float eps, Stream stream);
// d_residual: null, or added to dx. dweight_parts: null where it is not wanted, else [ceil(rows / kRmsNormRows), width],
// whose sum over the first dimension is the weight's gradient.
inline constexpr int64_t kRmsNormRows = 8;
template <class T>
void rms_norm_backward(const T* x, const T* weight, const float* rstd, const T* dy, const T* d_residual, T* dx,
                       float* dweight_parts, int64_t rows, int64_t width, Stream stream);

// x and y [rows, heads, width], rows `x_stride` and `y_stride` elements apart; cos, sin [rows, width], of which the
// first half of a row is read: each head turned by its row's angles; with sign -1 turned back.
template <class T>
void rotate(const T* x, int64_t x_stride, const float* cos, const float* sin, float sign, T* y, int64_t y_stride,
            int64_t rows, int64_t heads, int64_t width, Stream stream);

// gate_up [rows, 2 width] -> y [rows, width].
template <class T>
void swiglu_forward(const T* gate_up, T* y, int64_t rows, int64_t width, Stream stream);
template <class T>
void swiglu_backward(const T* gate_up, const T* dy, T* d_gate_up, int64_t rows, int64_t width, Stream stream);

// x and y [rows, width]: y = x * scale where an element's noise is at least `threshold`, else 0. Its noise is that of its
// column under the words of its row's key and the seed.
template <class T>
void dropout(const T* x, T* y, const int64_t* keys, uint64_t seed, int64_t rows, int64_t width, uint32_t threshold,
             float scale, Stream stream);

// y = x * sigmoid(1.702 x), which may be x itself; dx may be dy itself.
template <class T>
void quick_gelu_forward(const T* x, T* y, int64_t count, Stream stream);
template <class T>
void quick_gelu_backward(const T* x, const T* dy, T* dx, int64_t count, Stream stream);

// nll [rows] = log(sum(exp(row))) - row[target] of logits [rows, vocab]; with `gradient` the logits become
// scale * (softmax(row) - onehot(target)). A target outside of the vocabulary gives NaN.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, float* nll, int64_t rows, int64_t vocab, bool gradient,
                   float scale, Stream stream);

// A master of model/ops/adamw.h: whole, or a bfloat16 weight and what its remainder makes a float32 one of.
// Without both, the bfloat16 weight is all there is.
struct Weights {
  float* whole = nullptr;
  Bf16* weight = nullptr;
  int16_t* remainder = nullptr;
};

// model/ops/adamw.h in float32, as adamw.cpp computes it. A null gradient counts as zeros.
struct AdamWFactors {
  float decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction2, epsilon, grad_scale;
};
template <class T>
void adamw(const Weights& weights, float* exp_avg, float* exp_avg_sq, const T* gradient, int64_t count,
           const AdamWFactors& factors, Stream stream);

// model/ops/adamw_compact.h. Each moment is float32, or codes with one scale for kCodesPerScale elements (the
// other form's pointers are null). Where the weight is all there is, it is rounded by the noise. `tables` lie in the
// device's memory.
inline constexpr int64_t kCodesPerScale = 256;
struct CompactState {
  Weights weights;
  float *exp_avg = nullptr, *exp_avg_sq = nullptr;
  uint8_t *exp_avg_codes = nullptr, *exp_avg_sq_codes = nullptr;
  float *exp_avg_scale = nullptr, *exp_avg_sq_scale = nullptr;
};
struct CompactNoise {
  NoiseWords words;
  uint32_t first_index;
};
template <class T>
void adamw_compact(const CompactState& state, const T* gradient, const CodeTables* tables, int64_t count,
                   const AdamWFactors& factors, const CompactNoise& noise, Stream stream);

// model/ops/nf4.h. Two elements a byte of `codes`, indices into `values` (in the host's memory), times a scale for each
// 64 elements: `scale`, or where that is null map[codes[block]] * group_scale[block / 256] + offset.
struct Nf4Scales {
  const float* scale = nullptr;
  const uint8_t* codes = nullptr;
  const float *map = nullptr, *group_scale = nullptr;
  float offset = 0;
};
template <class T>
void dequantize_nf4(const uint8_t* codes, const Nf4Scales& scales, const std::array<float, 16>& values, T* out,
                    int64_t count, Stream stream);

// pixels [num_images, 3, size, size] -> patches [num_images, grid * grid, 3 * patch * patch] of
// pixel * scale[channel] + shift[channel], both in the host's memory; grid = size / patch, what is left over
// at the edges is not read.
template <class T>
void normalized_patches(const uint8_t* pixels, T* patches, int64_t num_images, int64_t size, int64_t patch,
                        const std::array<float, 3>& scale, const std::array<float, 3>& shift, Stream stream);

// Throws caldera::Error unless `error`, a cudaError_t, means success.
void check_launch(const char* kernel, int error);

}  // namespace caldera::CALDERA_KERNELS
