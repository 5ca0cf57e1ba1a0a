// Our own matrix product against ATen in double precision, over sizes around its tiles', panels' and blocks',
// and its bits over everything that must not change them.
#include "model/ops/gemm.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <thread>
#include <tuple>

#include "base/cpu.h"
#include "tests/aten.h"

namespace caldera::gemm {
namespace {

constexpr at::ScalarType kTypes[] = {at::kFloat, at::kBFloat16};

// [rows, cols], of a transposed view or not, with more between the rows than belongs there.
at::Tensor random(int64_t rows, int64_t cols, at::ScalarType dtype, bool is_transposed = false) {
  const auto padded = [&](int64_t r, int64_t c) { return at::randn({r, c + 5}).to(dtype).narrow(1, 3, c); };
  return is_transposed ? padded(cols, rows).t() : padded(rows, cols);
}

double error(const at::Tensor& got, const at::Tensor& expected) {
  if (expected.numel() == 0) return 0;
  return ((got.to(at::kDouble) - expected).norm() / (expected.norm() + 1e-30)).item<double>();
}
double tolerance(at::ScalarType dtype) { return dtype == at::kFloat ? 1e-6 : 3e-3; }

bool same_bits(const at::Tensor& x, const at::Tensor& y) {
  return x.sizes() == y.sizes() && x.scalar_type() == y.scalar_type() && x.is_contiguous() &&
         y.is_contiguous() && std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

at::Tensor product(const at::Tensor& a, const at::Tensor& b, at::ScalarType dtype) {
  const at::Tensor out = at::empty({a.size(0), b.size(1)}, dtype);
  product_into(a, b, out);
  return out;
}
Matrix matrix(const at::Tensor& x) {
  return {x.const_data_ptr(), x.scalar_type() == at::kBFloat16, x.stride(0), x.stride(1)};
}

class Gemm : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cpu().avx2) GTEST_SKIP() << "this processor has no AVX2";
    at::manual_seed(1);
  }
  void TearDown() override { at::set_num_threads(num_threads_); }

 private:
  const int num_threads_ = at::get_num_threads();
};

TEST_F(Gemm, MultipliesEverySizeInEveryLayout) {
  const int64_t sizes[][3] = {{1, 1, 1},     {1, 16, 8},     {2, 17, 9},   {3, 8, 321},    {4, 31, 7},
                              {5, 1, 65},    {6, 15, 320},   {7, 33, 64},  {8, 24, 2},     {11, 9, 1000},
                              {13, 40, 16},  {48, 100, 193}, {119, 7, 33}, {121, 50, 322}, {130, 1, 40},
                              {250, 97, 70}, {1, 700, 650},  {300, 16, 5}, {9, 2100, 40}};
  for (const auto& [M, N, K] : sizes) {
    for (const at::ScalarType a_type : kTypes) {
      for (const at::ScalarType b_type : kTypes) {
        for (int layout = 0; layout < 4; ++layout) {
          const at::Tensor a = random(M, K, a_type, layout & 1), b = random(K, N, b_type, layout & 2);
          const at::Tensor expected = a.to(at::kDouble).mm(b.to(at::kDouble));
          const at::Tensor got = product(a, b, at::kFloat);
          EXPECT_LT(error(got, expected), tolerance(at::kFloat))
              << M << ' ' << N << ' ' << K << " layout " << layout;
          // The same sums, rounded once.
          EXPECT_TRUE(same_bits(product(a, b, at::kBFloat16), got.to(at::kBFloat16)))
              << M << ' ' << N << ' ' << K;
        }
      }
    }
  }
}

// More of the right factor than is packed at once.
TEST_F(Gemm, MultipliesLargeFactors) {
  for (const at::ScalarType dtype : kTypes) {
    const at::Tensor a = random(125, 7000, dtype), b = random(7000, 310, dtype, /*is_transposed=*/true);
    EXPECT_LT(error(product(a, b, at::kFloat), a.to(at::kDouble).mm(b.to(at::kDouble))),
              tolerance(at::kFloat));
  }
}

TEST_F(Gemm, AddsBiasAndWhatIsThere) {
  for (const auto& [M, N, K] :
       {std::tuple(20, 37, 50), std::tuple(140, 64, 700), std::tuple(200, 3, 0), std::tuple(5, 40, 0)}) {
    for (const at::ScalarType dtype : kTypes) {
      const at::Tensor a = random(M, K, dtype), b = random(K, N, dtype, /*is_transposed=*/true);
      const at::Tensor bias = at::randn({N}).to(dtype), before = at::randn({M, N}).to(dtype);
      const at::Tensor plain = a.to(at::kDouble).mm(b.to(at::kDouble));
      for (const bool has_bias : {false, true}) {
        for (const bool accumulate : {false, true}) {
          const at::Tensor out = before.clone();
          product_into(a, b, out, accumulate, has_bias ? bias : at::Tensor());
          at::Tensor expected = plain.clone();
          if (has_bias) expected += bias;
          if (accumulate) expected += before;
          EXPECT_LE(error(out, expected), tolerance(dtype))
              << M << ' ' << N << ' ' << K << ' ' << has_bias << accumulate;
        }
      }
    }
  }
}

TEST_F(Gemm, TakesEmptyAndExpandedFactors) {
  EXPECT_EQ(product(at::ones({0, 7}), at::ones({7, 5}), at::kFloat).numel(), 0);
  EXPECT_EQ(product(at::ones({4, 7}), at::ones({7, 0}), at::kFloat).numel(), 0);
  EXPECT_TRUE(at::equal(product(at::ones({4, 0}), at::ones({0, 5}), at::kFloat), at::zeros({4, 5})));
  // One row for all of them, one element for a whole row, every second column.
  const at::Tensor row = at::randn({1, 30}).expand({20, 30}), b = at::randn({30, 40});
  EXPECT_LT(error(product(row, b, at::kFloat), row.to(at::kDouble).mm(b.to(at::kDouble))), 1e-6);
  EXPECT_LT(error(product(b.t(), row.t(), at::kFloat), b.to(at::kDouble).t().mm(row.to(at::kDouble).t())),
            1e-6);
  const at::Tensor one = at::randn({20, 1}).expand({20, 30}),
                   every_second = at::randn({30, 80}).slice(1, 0, 80, 2);
  EXPECT_LT(
      error(product(one, every_second, at::kFloat), one.to(at::kDouble).mm(every_second.to(at::kDouble))),
      1e-6);
}

TEST_F(Gemm, MultipliesBatches) {
  for (const int64_t count : {1, 3, 40}) {
    for (const at::ScalarType dtype : kTypes) {
      const at::Tensor a = at::randn({count, 33, 70}).to(dtype),
                       b = at::randn({count, 90, 70}).to(dtype).transpose(1, 2);
      const at::Tensor before = at::randn({count, 33, 90}).to(dtype), out = before.clone();
      product_into(a, b, out);
      for (int64_t i = 0; i < count; ++i) EXPECT_TRUE(same_bits(out[i], product(a[i], b[i], dtype))) << i;
      const at::Tensor sums = before.clone();
      product_into(a, b, sums, /*accumulate=*/true);
      EXPECT_LT(error(sums, before.to(at::kDouble) + a.to(at::kDouble).bmm(b.to(at::kDouble))),
                tolerance(dtype));
    }
  }
}

TEST_F(Gemm, KeepsNotANumberInItsRow) {
  at::Tensor a = at::randn({40, 30});
  a[7][3] = std::numeric_limits<float>::quiet_NaN();
  a[9][4] = std::numeric_limits<float>::infinity();
  for (const at::ScalarType dtype : kTypes) {
    const at::Tensor out = product(a, at::randn({30, 21}), dtype);
    const at::Tensor is_finite = out.isfinite().sum(1);
    EXPECT_TRUE(out[7].isnan().all().item<bool>());
    EXPECT_EQ(out[9].isinf().sum().item<int64_t>(), 21);
    EXPECT_EQ(is_finite.sum().item<int64_t>(), 38 * 21);
  }
}

TEST_F(Gemm, GivesTheSameBitsOnAnyNumberOfThreads) {
  for (const auto& [M, N, K] :
       {std::tuple(300, 200, 400), std::tuple(40, 900, 350), std::tuple(1000, 24, 330)}) {
    for (const at::ScalarType dtype : kTypes) {
      for (int layout = 0; layout < 4; ++layout) {
        const at::Tensor a = random(M, K, dtype, layout & 1), b = random(K, N, dtype, layout & 2);
        at::set_num_threads(1);
        const at::Tensor alone = product(a, b, dtype);
        for (const int threads : {2, 3, 7}) {
          at::set_num_threads(threads);
          EXPECT_TRUE(same_bits(product(a, b, dtype), alone))
              << M << ' ' << N << ' ' << K << " threads " << threads;
        }
      }
    }
  }
}

TEST_F(Gemm, GivesTheSameBitsHoweverFactorsLie) {
  const at::Tensor a = at::randn({250, 700}), b = at::randn({700, 90});
  const at::Tensor expected = product(a, b, at::kFloat);
  EXPECT_TRUE(same_bits(product(a.t().contiguous().t(), b, at::kFloat), expected));
  EXPECT_TRUE(same_bits(product(a, b.t().contiguous().t(), at::kFloat), expected));
  // A row is what it is alone.
  EXPECT_TRUE(same_bits(product(a.narrow(0, 100, 3), b, at::kFloat), expected.narrow(0, 100, 3)));
}

// Deeper than what is packed at once: few rows and many, more columns and rows than are added up at once, a
// last slice that is shorter.
TEST_F(Gemm, MultipliesDeepFactors) {
  for (const auto& [M, N, K] :
       {std::tuple(5, 33, 20000), std::tuple(100, 40, 20000), std::tuple(130, 40, 20000),
        std::tuple(3, 9000, 4200), std::tuple(125, 510, 8320), std::tuple(1100, 17, 4161)}) {
    for (const at::ScalarType dtype : kTypes) {
      for (const int layout : {0, 3}) {
        const at::Tensor a = random(M, K, dtype, layout & 1), b = random(K, N, dtype, layout & 2);
        const at::Tensor bias = at::randn({N}).to(dtype), before = at::randn({M, N}).to(dtype);
        const at::Tensor out = before.clone();
        at::set_num_threads(1);
        product_into(a, b, out, /*accumulate=*/true, bias);
        if (layout == 0) {
          const at::Tensor plain = a.to(at::kDouble).mm(b.to(at::kDouble));
          EXPECT_LT(error(out, plain + bias + before), tolerance(dtype)) << M << ' ' << N << ' ' << K;
          // The same sums, rounded once.
          EXPECT_TRUE(same_bits(product(a, b, at::kBFloat16), product(a, b, at::kFloat).to(at::kBFloat16)))
              << M << ' ' << N << ' ' << K;
        }
        for (const int threads : {2, 3}) {
          at::set_num_threads(threads);
          const at::Tensor again = before.clone();
          product_into(a, b, again, /*accumulate=*/true, bias);
          EXPECT_TRUE(same_bits(again, out)) << M << ' ' << N << ' ' << K << " threads " << threads;
        }
        // Rows are what they are alone.
        if (dtype == at::kFloat) {
          EXPECT_TRUE(same_bits(product(a.narrow(0, 1, 2), b, dtype), product(a, b, dtype).narrow(0, 1, 2)));
        }
      }
    }
  }
}

// Slices leave the sums as they are: in float32, block of the depth by block, the last one shorter.
TEST_F(Gemm, AddsUpADeepProductInTheOrderOfItsBlocks) {
  constexpr int64_t kDepth = 320, kAll = 32 * kDepth + 100;  // as the depth is cut
  for (const int64_t rows : {20, 150}) {
    const at::Tensor a = at::randn({rows, kAll}), b = at::randn({kAll, 40});
    at::Tensor sums = at::zeros({rows, 40});
    for (int64_t begin = 0; begin < kAll; begin += kDepth) {
      const int64_t depth = std::min(kDepth, kAll - begin);
      product_into(a.narrow(1, begin, depth), b.narrow(0, begin, depth), sums, /*accumulate=*/true);
    }
    EXPECT_TRUE(same_bits(product(a, b, at::kFloat), sums)) << rows;
  }
}

// However deep, wide or many products are: of threads that have multiplied nothing before.
TEST_F(Gemm, KeepsLittleMemory) {
  const int64_t of_thread = most_kept_bytes(2) - most_kept_bytes(1);
  const auto multiply = [](int64_t M, int64_t N, int64_t K, at::ScalarType dtype) {
    product(at::ones({1, K}, dtype).expand({M, K}), at::ones({K, 1}, dtype).expand({K, N}), dtype);
  };
  const auto in_another_thread = [&](auto f) {
    std::thread([&] {
      at::set_num_threads(2);
      EXPECT_EQ(kept_bytes(), 0);
      f();
      EXPECT_GT(kept_bytes(), 0);
      EXPECT_LE(kept_bytes(), most_kept_bytes(1));
      at::parallel_for(0, 2, 1, [&](int64_t, int64_t) {
        if (at::get_thread_num() > 0) {
          EXPECT_LE(kept_bytes(), of_thread);
        }
      });
    }).join();
  };
  for (const at::ScalarType dtype : kTypes) {
    in_another_thread([&] { multiply(100, 200, 60000, dtype); });   // left factors
    in_another_thread([&] { multiply(130, 256, 60000, dtype); });   // right ones
    in_another_thread([&] { multiply(10000, 600, 4170, dtype); });  // sums of all threads
    in_another_thread([&] { multiply(120, 20000, 4170, dtype); });  // and of each
    in_another_thread([&] {
      const at::Tensor out = at::empty({4, 130, 256}, dtype);
      product_into(at::ones({4, 1, 20000}, dtype).expand({4, 130, 20000}),
                   at::ones({4, 20000, 1}, dtype).expand({4, 20000, 256}), out);
    });
  }
  EXPECT_LE(most_kept_bytes(16), 100 << 20);
}

TEST_F(Gemm, MultipliesFactorsThatAreReady) {
  constexpr int64_t kRows = 50, kColumns = 48, kDepth = 700, kAll = 720;
  const at::Tensor a = at::randn({kRows, kAll}), a_transposed = at::randn({kDepth, 64}),
                   b = at::randn({kAll, kColumns});
  at::Tensor panels = at::empty({kColumns * kAll});
  pack_right(matrix(b), kAll, kColumns, panels.data_ptr<float>(), kAll * kPanel);
  const Right packed{panels.data_ptr<float>(), kPanel, kAll * kPanel},
      as_it_is{b.data_ptr<float>(), kColumns, kPanel};
  const Left rows{a.data_ptr<float>(), kAll, kAll, true},
      columns{a_transposed.data_ptr<float>(), 1, 64, false};
  const at::Tensor b64 = b.narrow(0, 0, kDepth).to(at::kDouble);
  for (const Right& right : {packed, as_it_is}) {
    const at::Tensor out = at::ones({kRows, kColumns});
    multiply_ready(kRows, kColumns, kDepth, rows, right, out.data_ptr<float>(), kColumns);
    EXPECT_LT(error(out, a.narrow(1, 0, kDepth).to(at::kDouble).mm(b64)), 1e-6);
    const at::Tensor before = out.to(at::kDouble);
    multiply_ready(kRows, kColumns, kDepth, columns, right, out.data_ptr<float>(), kColumns,
                   /*accumulate=*/true);
    EXPECT_LT(error(out, before + a_transposed.narrow(1, 0, kRows).to(at::kDouble).t().mm(b64)), 1e-6);
  }
}

}  // namespace
}  // namespace caldera::gemm
