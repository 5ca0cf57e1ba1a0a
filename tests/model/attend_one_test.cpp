// Attention of single queries against double precision: heads that share keys, widths and lengths of every
// remainder.
#include "model/ops/attend_one.h"

#include <gtest/gtest.h>
#include <cmath>
#include <limits>

#include "tests/aten.h"

// Legend: G key heads, R query heads of each, K head width, L keys.
namespace caldera {
namespace {

at::Tensor attended(const std::vector<at::Tensor>& q, const std::vector<at::Tensor>& k,
                    const std::vector<at::Tensor>& v) {
  const at::Tensor out = at::full({std::ssize(q), q[0].size(1), q[0].size(2)}, 7, q[0].options());
  std::vector<AttentionSample> samples;
  std::vector<AttentionRows> rows;
  for (size_t s = 0; s < q.size(); ++s) {
    samples.push_back({{q[s], 0, 1}, {k[s], 0, k[s].size(0)}, {v[s], 0, v[s].size(0)}});
    rows.emplace_back(out, static_cast<int64_t>(s), 1);
  }
  attend_one_query(samples, rows);
  return out;
}

at::Tensor expected(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const int64_t heads = q.size(1) / k.size(1);
  const auto by_head = [&](const at::Tensor& x, int64_t count) {
    return x.to(at::kDouble).repeat_interleave(count, 1).transpose(0, 1);
  };
  const at::Tensor scores = by_head(q, 1).bmm(by_head(k, heads).transpose(1, 2));
  const double scale = 1 / std::sqrt(static_cast<double>(q.size(2)));
  return (scores * scale).softmax(-1).bmm(by_head(v, heads)).transpose(0, 1);
}

class AttendOne : public testing::TestWithParam<at::ScalarType> {};

TEST_P(AttendOne, IsTheSameAsInDoublePrecision) {
  at::manual_seed(1);
  const double tolerance = GetParam() == at::kFloat ? 1e-5 : 1e-2;
  for (const auto& [G, R] : {std::pair<int64_t, int64_t>{1, 1}, {3, 3}, {2, 4}, {2, 7}}) {
    for (const int64_t K : {4, 33, 64, 80, 128}) {
      for (const int64_t L : {1, 3, 4, 5, 16, 17, 100, 301}) {
        const at::Tensor q = at::randn({1, G * R, K}).to(GetParam()), k = at::randn({L, G, K}).to(GetParam()),
                         v = at::randn({L, G, K}).to(GetParam());
        const at::Tensor wanted = expected(q, k, v);
        const double error = (attended({q}, {k}, {v}).to(at::kDouble) - wanted).abs().max().item<double>();
        EXPECT_LT(error, tolerance * wanted.abs().max().item<double>())
            << G << " x " << R << " heads of " << K << ", " << L << " keys";
      }
    }
  }
}

TEST_P(AttendOne, SamplesOfAnyLengthStandAlone) {
  at::manual_seed(2);
  std::vector<at::Tensor> q, k, v;
  for (const int64_t L : {5, 700, 64}) {
    q.push_back(at::randn({1, 6, 64}).to(GetParam()));
    k.push_back(at::randn({L, 2, 64}).to(GetParam()));
    v.push_back(at::randn({L, 2, 64}).to(GetParam()));
  }
  v[1][3][1][5] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor all = attended(q, k, v);
  for (size_t s = 0; s < 3; s += 2)
    EXPECT_TRUE(at::equal(all.narrow(0, static_cast<int64_t>(s), 1), attended({q[s]}, {k[s]}, {v[s]})));
  EXPECT_TRUE(all[1][0].isfinite().all().item<bool>());
  EXPECT_TRUE(all[1][3][5].isnan().item<bool>());
}

INSTANTIATE_TEST_SUITE_P(Types, AttendOne, testing::Values(at::kFloat, at::kBFloat16));

}  // namespace
}  // namespace caldera
