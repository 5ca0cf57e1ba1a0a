// Each way of multiplying a few rows that this processor has, against double precision and each other: odd
// sizes, and the largest numbers there can be.
#include "base/cpu.h"
#include "model/ops/few_rows_avx2.h"
#include "model/ops/few_rows_avx512.h"
#include "model/ops/short_rows.h"

#include <gtest/gtest.h>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

// Legend: N rows, I inputs, O outputs.
namespace caldera {
namespace {

std::vector<float> random(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(count));
  for (float& value : x) value = normal(generator);
  return x;
}
std::vector<int8_t> random_bytes(int64_t count) {
  std::mt19937 generator(5);
  std::vector<int8_t> x(static_cast<size_t>(count));
  for (int8_t& value : x) value = static_cast<int8_t>(static_cast<int>(generator() % 255) - 127);
  return x;
}

struct Sum {
  double value, magnitude;
};
// Of row r of x and row o of the weight.
template <class X, class W>
Sum sum_of(const X& x, const W& weight, int64_t r, int64_t o, int64_t I) {
  Sum sum{};
  for (int64_t i = 0; i < I; ++i) {
    const double product = static_cast<double>(static_cast<float>(x[static_cast<size_t>(r * I + i)])) *
                           static_cast<double>(static_cast<float>(weight[static_cast<size_t>(o * I + i)]));
    sum.value += product;
    sum.magnitude += std::abs(product);
  }
  return sum;
}

// compute(sums [N, O], begin, end) for all outputs in two parts; each sum must be within `tolerance` of the
// products' magnitudes, or exact up to the rounding to float32 where that is zero.
template <class X, class W, class Compute>
std::vector<float> checked(const X& x, const W& weight, int64_t N, int64_t I, int64_t O, double tolerance,
                           Compute compute) {
  std::vector<float> sums(static_cast<size_t>(N * O), std::numeric_limits<float>::quiet_NaN());
  const int64_t border = O / 8 * 4;
  compute(sums.data(), int64_t{0}, border);
  compute(sums.data(), border, O);
  for (int64_t r = 0; r < N; ++r) {
    for (int64_t o = 0; o < O; ++o) {
      const Sum expected = sum_of(x, weight, r, o, I);
      const float got = sums[static_cast<size_t>(r * O + o)];
      if (tolerance == 0)
        EXPECT_EQ(got, static_cast<float>(expected.value)) << N << " x " << I << " -> " << O;
      else
        EXPECT_LE(std::abs(got - expected.value), tolerance * expected.magnitude)
            << N << " x " << I << " -> " << O;
    }
  }
  return sums;
}

struct Shape {
  int64_t N, I, O;
};
std::vector<Shape> shapes() {
  std::vector<Shape> list;
  for (const int64_t N : {1, 2, 3, 4, 7})
    for (const int64_t I : {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200, 4095, 4096, 4097})
      for (const int64_t O : {1, 2, 3, 5, 8, 13}) list.push_back({N, I, O});
  return list;
}

#ifdef __x86_64__
TEST(FewRowsAvx2, Float32AndBfloat16AreRight) {
  if (!cpu().avx2) GTEST_SKIP();
  for (const auto& [N, I, O] : shapes()) {
    const std::vector<float> x = random(N * I, 1), weight = random(O * I, 2);
    const auto first_row = [&](const std::vector<float>& sums) {
      return std::vector<float>(sums.begin(), sums.begin() + O);
    };
    const auto float_sums = [&](int64_t rows) {
      return checked(x, weight, rows, I, O, 1e-6, [&](float* sums, int64_t begin, int64_t end) {
        avx2::float_sums(x.data(), weight.data(), sums, rows, I, O, begin, end);
      });
    };
    EXPECT_EQ(first_row(float_sums(N)), float_sums(1)) << "a row's bits depend on the others";
    const std::vector<c10::BFloat16> x16(x.begin(), x.end()), weight16(weight.begin(), weight.end());
    const auto bf16_sums = [&](int64_t rows) {
      return checked(x16, weight16, rows, I, O, 1e-6, [&](float* sums, int64_t begin, int64_t end) {
        avx2::bf16_sums(x16.data(), weight16.data(), sums, rows, I, O, begin, end);
      });
    };
    EXPECT_EQ(first_row(bf16_sums(N)), bf16_sums(1)) << "a row's bits depend on the others";
  }
}
#endif

TEST(ShortRows, ErrByHalfAStepOfTheirScale) {
  std::vector<float> x = random(3 * 100, 3);
  x[250] = -std::numeric_limits<float>::infinity();
  for (size_t i = 100; i < 200; ++i) x[i] = 0;
  x[150] = -std::numeric_limits<float>::max();
  const ShortRows rows = short_rows(x.data(), 3, 100);
  for (size_t i = 0; i < 200; ++i) {
    const float scale = rows.scale[i / 100];
    EXPECT_LE(std::abs(static_cast<double>(rows.values[i]) * scale - x[i]), 0.501 * scale);
  }
  EXPECT_EQ(rows.values[150], -32767);
  EXPECT_TRUE(std::isnan(rows.scale[2]));
}

// Exact sums of whole numbers, the same from all instructions.
void expect_exact(const std::vector<float>& x, [[maybe_unused]] const std::vector<int8_t>& weight, int64_t N, int64_t I,
                  [[maybe_unused]] int64_t O) {
  const ShortRows rows = short_rows(x.data(), N, I);
#ifdef __x86_64__
  if (cpu().avx2) {
    checked(rows.values, weight, N, I, O, 0, [&](float* sums, int64_t begin, int64_t end) {
      avx2::int8_sums(rows, weight.data(), sums, N, I, O, begin, end);
    });
  }
#endif
#ifdef __x86_64__
  if (has_int8_products() && I <= 65536) {
    const SplitRows split = split_rows(x.data(), N, I);
    EXPECT_EQ(split.scale, rows.scale);
    std::vector<int32_t> weight_sums(static_cast<size_t>(O));
    for (size_t i = 0; i < weight.size(); ++i) weight_sums[i / static_cast<size_t>(I)] += weight[i];
    checked(rows.values, weight, N, I, O, 0, [&](float* sums, int64_t begin, int64_t end) {
      int8_sums(split, weight.data(), weight_sums.data(), sums, N, I, O, begin, end);
    });
  }
#endif
}

TEST(FewRows, Int8IsExact) {
  for (const auto& [N, I, O] : shapes()) expect_exact(random(N * I, 1), random_bytes(O * I), N, I, O);
}

TEST(FewRows, Int8HoldsTheLargestSums) {
  for (const int64_t I : {4096, 4160, 65535, 65536, 100000}) {
    for (const float x : {3.0f, -3.0f}) {
      for (const int8_t weight : {int8_t{127}, int8_t{-127}})
        expect_exact(std::vector<float>(static_cast<size_t>(2 * I), x),
                     std::vector<int8_t>(static_cast<size_t>(3 * I), weight), 2, I, 3);
    }
  }
}

#ifdef __x86_64__
TEST(FewRowsAvx512, Bfloat16IsRight) {
  if (!has_bf16_products()) GTEST_SKIP();
  for (const auto& [N, I, O] : shapes()) {
    const std::vector<float> x = random(N * I, 1), weight = random(O * I, 2);
    const std::vector<c10::BFloat16> x16(x.begin(), x.end()), weight16(weight.begin(), weight.end());
    checked(x16, weight16, N, I, O, 1e-6, [&](float* sums, int64_t begin, int64_t end) {
      bf16_sums(x16.data(), weight16.data(), sums, N, I, O, begin, end);
    });
  }
}
#endif

}  // namespace
}  // namespace caldera
