#include "model/projector/projector.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>

#include "base/cpu_allocator.h"
#include "base/error.h"
#include "tests/aten.h"

namespace caldera {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::ThrowsMessage;

std::vector<std::string> names(Projector& projector) {
  std::vector<std::string> list;
  for (const NamedTensor& tensor : projector.tensors()) list.push_back(tensor.name);
  return list;
}

TEST(Projector, Mlp2xIsLinearGeluLinear) {
  const auto projector = make_projector("mlp2x_gelu", 6, 4);
  init_projector(*projector, 3);
  EXPECT_THAT(names(*projector),
              ElementsAre("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"));
  const NamedTensors t = projector->tensors();
  const at::Tensor x = at::randn({5, 6});
  const at::Tensor hidden = x.mm(t[0].value().t()) + t[1].value();
  const at::Tensor exact_gelu = 0.5 * hidden * (1 + (hidden / std::sqrt(2.0)).erf());
  EXPECT_TRUE(
      at::allclose(projector->forward(x), exact_gelu.mm(t[2].value().t()) + t[3].value(), 1e-5, 1e-6));
}

// Against the plain composition in double; and between forward and backward an activation is not there beside what it
// was made of.
TEST(Projector, GradientsAndWhatIsKeptForThem) {
  use_caching_cpu_allocator();
  constexpr int64_t kRows = 1024, kWidth = 256;  // 1 MiB each in float32
  const auto projector = make_projector("mlp3x_gelu", 96, kWidth);
  init_projector(*projector, 3);
  const at::Tensor x = at::randn({kRows, 96}), dy = at::randn({kRows, kWidth});
  std::vector<at::Tensor> leaves, doubles;
  for (const NamedTensor& tensor : projector->tensors()) {
    leaves.push_back(tensor.owner->set_requires_grad(true));
    doubles.push_back(tensor.owner->detach().to(at::kDouble).set_requires_grad(true));
  }
  at::Tensor plain = x.to(at::kDouble);
  for (size_t i = 0; i < doubles.size(); i += 2)
    plain = at::linear(i == 0 ? plain : at::gelu(plain), doubles[i], doubles[i + 1]);
  const int64_t before = cpu_memory().live_bytes;
  const at::Tensor y = projector->forward(x);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  EXPECT_EQ(cpu_memory().live_bytes - before, 3 * kRows * kWidth * 4);  // two layers' results, and the last one's
#endif
  const auto got = torch::autograd::grad({y}, leaves, {dy});
  const auto expected = torch::autograd::grad({plain}, doubles, {dy.to(at::kDouble)});
  EXPECT_LT((y.detach().to(at::kDouble) - plain.detach()).abs().max().item<double>(), 1e-5);
  for (size_t i = 0; i < leaves.size(); ++i) {
    const double scale = expected[i].abs().max().item<double>();
    EXPECT_LT((got[i].to(at::kDouble) - expected[i]).abs().max().item<double>(), 1e-5 * scale) << i;
  }
}

TEST(Projector, OtherTypes) {
  EXPECT_THAT(names(*make_projector("linear", 6, 4)), ElementsAre("linear_1.weight", "linear_1.bias"));
  EXPECT_EQ(names(*make_projector("mlp3x_gelu", 6, 4)).size(), 6);
  const auto identity = make_projector("identity", 4, 4);
  EXPECT_TRUE(identity->tensors().empty());
  const at::Tensor x = at::randn({2, 4});
  EXPECT_TRUE(at::equal(identity->forward(x), x));
}

TEST(Projector, InitialisationIsUniformWithinItsFanInAndReproducible) {
  const auto a = make_projector("mlp2x_gelu", 400, 100), b = make_projector("mlp2x_gelu", 400, 100);
  init_projector(*a, 3);
  init_projector(*b, 3);
  for (size_t i = 0; i < a->tensors().size(); ++i) {
    const at::Tensor value = a->tensors()[i].value();
    EXPECT_TRUE(at::equal(value, b->tensors()[i].value()));
    const double bound = i < 2 ? 1 / 20.0 : 1 / 10.0, top = value.abs().max().item<double>();
    EXPECT_LE(top, bound);
    EXPECT_GT(top, 0.9 * bound);
  }
}

TEST(Projector, RefusesWhatItDoesNotKnow) {
  EXPECT_THAT(
      [] { make_projector("mlp2x_gelo", 6, 4); },
      ThrowsMessage<ConfigError>(HasSubstr("\"mlp2x_gelo\" is not known; did you mean \"mlp2x_gelu\"?")));
  EXPECT_THAT([] { make_projector("identity", 6, 4); },
              ThrowsMessage<ConfigError>(HasSubstr("needs equal widths")));
}

}  // namespace
}  // namespace caldera
