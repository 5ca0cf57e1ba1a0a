// By which code matrices are multiplied on a CPU. MKL picks its code by the maker's name: on CPUs that are
// not Intel's it runs float32 products at a quarter of what the cores can do, and oneDNN, which comes in the
// same library, runs them in full (measured on an AMD EPYC of family 26, one core: 60 against 260 GFLOP/s),
// where LibTorch lets it: with AVX-512. bfloat16 runs by oneDNN where the processor multiplies it faster than
// float32, and in float32 on other x86 CPUs, but for narrow products (on two cores of an Intel Xeon with
// AVX512_BF16 and without AMX: 165 against 300 GFLOP/s).
#pragma once
#include <c10/core/ScalarType.h>

#include "base/cpu.h"

namespace at {
class Tensor;
}

namespace caldera {

enum class ProductWay { kAten, kOneDnn, kWidened, kOwn };  // kWidened: widened_product.h; kOwn: gemm.h

// The way for large matrices of this type on such a processor.
ProductWay product_way_of(const CpuDescription& cpu, at::ScalarType dtype);
// The same of this process's processor, if oneDNN does multiply there; found out once.
ProductWay product_way(at::ScalarType dtype);

// float32 or bfloat16: in which this processor trains fastest. Where bfloat16 has no products of its own it costs
// conversions, and saves memory alone.
at::ScalarType trains_fastest_in();

// Whether LibTorch's oneDNN multiplies matrices of this type (float32 or bfloat16) here: it was asked to,
// once.
bool onednn_multiplies(at::ScalarType dtype);
// out = a b by oneDNN, or with `accumulate` out += a b.
void onednn_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool accumulate);

}  // namespace caldera
