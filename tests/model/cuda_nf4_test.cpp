// The CUDA kernel that restores weights from 4 bits, run on the CPU (cuda_on_cpu.h), against the CPU's own.
#include "model/ops/dynamic_map.h"
#include "model/ops/nf4.h"
#include "tests/model/cuda_kernels.h"
// In this order: what the kernels need of CUDA stands above.
#include "model/ops/cuda/nf4.cu"

namespace caldera {
namespace {

template <class T>
class CudaNf4 : public CudaKernels<T> {};
TYPED_TEST_SUITE(CudaNf4, Dtypes);

TYPED_TEST(CudaNf4, DequantizeNf4) {
  using T = TypeParam;
  const std::array<float, 256>& map = dynamic_map(true);
  // Whole packs and single elements; parts of a block at the end; more than a block of threads, more than a
  // group of scales; places in a larger matrix.
  for (const auto& [count, behind] : {std::pair<int64_t, size_t>{1, 0},
                                      {7, 0},
                                      {64, 0},
                                      {130, 1},
                                      {4096, 0},
                                      {4096, 3},
                                      {64 * 300 + 5, 0},
                                      {64 * 300, 8}}) {
    for (const bool double_quant : {false, true}) {
      SCOPED_TRACE(testing::Message() << count << " from " << behind << (double_quant ? ", double" : ""));
      const Nf4Tensor tensor = quantize_nf4(random({count}, 0.1).to(at::kFloat), double_quant);
      const Tensors got = in_both_orders([&]() -> Tensors {
        Device<uint8_t> codes(tensor.codes);
        Device<T> out({count}, behind);
        if (!double_quant) {
          Device<float> scale(tensor.scale);
          kernels::dequantize_nf4(*codes, {.scale = *scale}, nf4_values(), *out, count, nullptr);
          return {out.tensor()};
        }
        Device<uint8_t> scale_codes(tensor.scale_codes.codes);
        Device<float> group(tensor.scale_codes.scale),
            map_(at::tensor(at::ArrayRef<float>(map.data(), map.size())));
        kernels::dequantize_nf4(
            *codes, {.codes = *scale_codes, .map = *map_, .group_scale = *group, .offset = tensor.offset},
            nf4_values(), *out, count, nullptr);
        return {out.tensor()};
      });
      const at::Tensor expected = at::empty({count}, kDtype<T>);
      dequantize_nf4_into(tensor, expected);
      EXPECT_TRUE(at::equal(got[0], expected));
    }
  }
}

}  // namespace
}  // namespace caldera
