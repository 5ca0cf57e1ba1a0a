#include "model/ops/product_way.h"

#include <ATen/ops/full.h>
#include <gmock/gmock.h>

#include <ostream>

#include "base/aten.h"
#include "tests/aten.h"

namespace caldera {

void PrintTo(ProductWay way, std::ostream* out) {
  *out << (way == ProductWay::kAten ? "ATen" : way == ProductWay::kOneDnn ? "oneDNN" : way == ProductWay::kOwn ? "own" : "widened");
}

namespace {

CpuDescription processor(const char* vendor, CpuClass cpu_class) {
  const CpuDescription all{.vendor = vendor,
                           .sse42 = true,
                           .avx2 = true,
                           .avx512 = true,
                           .avx512_vnni = true,
                           .avx512_bf16 = true,
                           .amx_bf16 = true};
  return held_to(all, cpu_class);
}

TEST(ProductWay, OfEveryClassOfProcessors) {
  struct Case {
    CpuClass cpu_class;
    ProductWay intel_float, intel_bf16, amd_float, amd_bf16;
  };
  constexpr ProductWay kAten = ProductWay::kAten, kOneDnn = ProductWay::kOneDnn,
                       kWidened = ProductWay::kWidened, kOwn = ProductWay::kOwn;
  for (const Case& c :
       {Case{CpuClass::kX86_64, kAten, kWidened, kAten, kWidened},
        Case{CpuClass::kX86_64V2, kAten, kWidened, kAten, kWidened},
        Case{CpuClass::kAvx2, kOwn, kOwn, kOwn, kOwn},
        Case{CpuClass::kAvx512, kAten, kWidened, kOneDnn, kWidened},
        Case{CpuClass::kAvx512Bf16, kAten, kWidened, kOneDnn, kOneDnn},
        Case{CpuClass::kAmx, kAten, kOneDnn, kOneDnn, kOneDnn}}) {
    SCOPED_TRACE(name_of(c.cpu_class));
    const CpuDescription intel = processor("GenuineIntel", c.cpu_class),
                         amd = processor("AuthenticAMD", c.cpu_class);
    EXPECT_EQ(product_way_of(intel, at::kFloat), c.intel_float);
    EXPECT_EQ(product_way_of(intel, at::kBFloat16), c.intel_bf16);
    EXPECT_EQ(product_way_of(amd, at::kFloat), c.amd_float);
    EXPECT_EQ(product_way_of(amd, at::kBFloat16), c.amd_bf16);
    EXPECT_EQ(product_way_of(amd, at::kDouble), kAten);
  }
  EXPECT_EQ(product_way_of({}, at::kFloat), kAten);
  EXPECT_EQ(product_way_of({}, at::kBFloat16), kWidened);
}

// Whatever the processor: the way that is taken is one that works.
TEST(ProductWay, OneDnnIsTakenOnlyWhereItMultiplies) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    EXPECT_TRUE(cpu().avx512 || product_way(dtype) != ProductWay::kOneDnn);
    EXPECT_EQ(product_way(dtype) == ProductWay::kOneDnn,
              product_way_of(cpu(), dtype) == ProductWay::kOneDnn && onednn_multiplies(dtype));
    if (!onednn_multiplies(dtype)) continue;
    const at::Tensor a = at::full({3, 5}, 2, dtype), b = at::full({5, 4}, 3, dtype);
    at::Tensor out = at::ones({3, 4}, dtype);
    onednn_product_into(a, b, out, /*accumulate=*/true);
    EXPECT_TRUE(at::equal(out, at::full({3, 4}, 31, dtype)));
    onednn_product_into(a, b, out, /*accumulate=*/false);
    EXPECT_TRUE(at::equal(out, at::full({3, 4}, 30, dtype)));
  }
  EXPECT_EQ(product_way(at::kDouble), ProductWay::kAten);
}

}  // namespace
}  // namespace caldera
