#include "model/ops/product_way.h"

#include <c10/core/GradMode.h>

#include <exception>

#include "base/aten.h"

namespace at::native {
// LibTorch exports it but ships no header: result = beta * result + alpha * a b, by oneDNN.
void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& result, float beta, float alpha);
}  // namespace at::native

namespace caldera {
namespace {

// What a library takes depends on its build and on the processor in ways of its own: it says so by throwing.
bool onednn_takes(at::ScalarType dtype) {
  if (!at::hasMKLDNN() || !cpu().avx512) return false;
  const at::NoGradGuard no_grad;
  const at::Tensor factor = at::ones({16, 16}, dtype), product = at::empty({16, 16}, dtype);
  try {
    onednn_product_into(factor, factor, product, /*accumulate=*/false);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

ProductWay way_here(at::ScalarType dtype) {
  const ProductWay way = product_way_of(cpu(), dtype);
  if (way != ProductWay::kOneDnn || onednn_multiplies(dtype)) return way;
  return product_way_of(held_to(cpu(), CpuClass::kAvx2), dtype);
}

}  // namespace

ProductWay product_way_of(const CpuDescription& cpu, at::ScalarType dtype) {
  if (dtype != at::kFloat && dtype != at::kBFloat16) return ProductWay::kAten;
  // LibTorch's bfloat16 products on ARM lose more than rounding (seen under QEMU alone).
  if (class_of(cpu) == CpuClass::kOther) return dtype == at::kFloat ? ProductWay::kAten : ProductWay::kWidened;
  if (cpu.avx2 && !cpu.avx512) return ProductWay::kOwn;
  if (dtype == at::kFloat) return cpu.avx512 && !cpu.is_intel() ? ProductWay::kOneDnn : ProductWay::kAten;
  // Of the processors with AVX512_BF16 AMD's multiply pairs at twice float32's speed, Intel's at half of it;
  // Intel's have AMX for that, where a virtual machine lets them.
  const bool multiplies_faster = cpu.amx_bf16 || (cpu.avx512_bf16 && !cpu.is_intel());
  return multiplies_faster ? ProductWay::kOneDnn : ProductWay::kWidened;
}

ProductWay product_way(at::ScalarType dtype) {
  static const ProductWay single = way_here(at::kFloat), half = way_here(at::kBFloat16);
  return dtype == at::kFloat ? single : dtype == at::kBFloat16 ? half : ProductWay::kAten;
}

at::ScalarType trains_fastest_in() {
  return product_way(at::kBFloat16) == ProductWay::kOneDnn ? at::kBFloat16 : at::kFloat;
}

bool onednn_multiplies(at::ScalarType dtype) {
  static const bool single = onednn_takes(at::kFloat), half = onednn_takes(at::kBFloat16);
  return dtype == at::kFloat ? single : dtype == at::kBFloat16 && half;
}

void onednn_product_into(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out, bool accumulate) {
  at::native::mkldnn_matmul(a, b, out, accumulate ? 1.0f : 0.0f, 1.0f);
}

}  // namespace caldera
