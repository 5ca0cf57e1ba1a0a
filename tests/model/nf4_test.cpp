// Weights in 4 bits against bitsandbytes' numbers (tests/golden/nf4.safetensors, made by
// scripts/make_goldens_nf4.py) and against plain ATen; the linear layer on top of them.
#include "model/ops/nf4.h"

#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "model/lora.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"
#include "model/weights/safetensors.h"

namespace caldera {
namespace {

at::Tensor normal(at::IntArrayRef shape, double std, const std::string& name) {
  at::Tensor values = at::empty(shape);
  init_normal_(values, std, 11, name);
  return values;
}

at::Tensor restored(const Nf4Tensor& tensor, at::ScalarType dtype = at::kFloat) {
  const at::Tensor out = at::empty(tensor.shape, dtype);
  dequantize_nf4_into(tensor, out);
  return out;
}

class Nf4 : public testing::Test {
 protected:
  at::Tensor golden(const std::string& name) const { return file_->read(name); }
  std::unique_ptr<TensorSource> file_ = open_safetensors(CALDERA_SOURCE_DIR "/tests/golden/nf4.safetensors");
};

TEST_F(Nf4, TheValuesAreBitsandbytes) {
  EXPECT_TRUE(at::equal(at::tensor(at::ArrayRef<float>(nf4_values())), golden("values")));
}

TEST_F(Nf4, CodesAndScalesAreBitsandbytes) {
  const at::Tensor weight = golden("weight");  // bfloat16
  for (const bool double_quant : {false, true}) {
    SCOPED_TRACE(double_quant);
    const Nf4Tensor tensor = quantize_nf4(weight, double_quant);
    EXPECT_TRUE(at::equal(tensor.codes, golden("single.codes")));
    if (double_quant) {
      EXPECT_FALSE(tensor.scale.defined());
      EXPECT_NEAR(tensor.offset, golden("double.offset").item<float>(), 1e-9);
      EXPECT_TRUE(at::allclose(tensor.scale_codes.scale, golden("double.group_absmax"), 1e-6, 0));
      EXPECT_TRUE(at::equal(tensor.scale_codes.codes, golden("double.absmax")));
    } else {
      EXPECT_TRUE(at::equal(tensor.scale, golden("single.absmax")));
    }
    const std::string name = double_quant ? "double" : "single";
    const at::Tensor wide = restored(tensor).narrow(0, 0, 8);
    const at::Tensor narrow = restored(tensor, at::kBFloat16).narrow(0, 0, 8);
    if (double_quant) {  // the offset is a mean, which may differ in its last bit
      EXPECT_TRUE(at::allclose(wide, golden("double.first_rows"), 1e-6, 0));
      EXPECT_LE((narrow != golden("double.first_rows_bfloat16")).sum().item<int64_t>(), 2);
    } else {
      EXPECT_TRUE(at::equal(wide, golden("single.first_rows")));
      EXPECT_TRUE(at::equal(narrow, golden("single.first_rows_bfloat16")));
    }
  }
}

// What the kernels do, by ATen alone: the scales, the nearest values, packed by hand.
TEST_F(Nf4, AnySizeIsAsPlainCodeHasIt) {
  const at::Tensor values = at::tensor(at::ArrayRef<float>(nf4_values()));
  const at::Tensor borders = (values.narrow(0, 0, 15) + values.narrow(0, 1, 15)) / 2;
  for (const int64_t count : {1, 2, 15, 63, 64, 65, 130, 1000, 64 * 600 + 17}) {
    SCOPED_TRACE(count);
    const at::Tensor x = normal({count}, 0.3, "x");
    const int64_t blocks = (count + 63) / 64;
    const at::Tensor padded = at::constant_pad_nd(x, {0, blocks * 64 - count}).view({blocks, 64});
    const at::Tensor scale = padded.abs().amax(1, true);
    const at::Tensor index = at::bucketize(padded * (1 / scale), borders);
    const at::Tensor expected = (values.index({index}) * scale).view(-1).narrow(0, 0, count);
    const Nf4Tensor tensor = quantize_nf4(x, false);
    EXPECT_TRUE(at::equal(tensor.scale, scale.view(-1)));
    const at::Tensor halves = index.view({-1, 2});
    const at::Tensor bytes = (halves.select(1, 0) * 16 + halves.select(1, 1)).narrow(0, 0, (count + 1) / 2);
    EXPECT_TRUE(at::equal(tensor.codes.to(at::kLong), bytes));
    EXPECT_TRUE(at::equal(restored(tensor), expected));
    EXPECT_TRUE(at::equal(restored(tensor, at::kBFloat16), expected.to(at::kBFloat16)));

    const Nf4Tensor twice = quantize_nf4(x, true);
    const at::Tensor scales = dequantize_dynamic(twice.scale_codes, true) + twice.offset;
    EXPECT_TRUE(at::equal(restored(twice),
                          (values.index({index}) * scales.view({blocks, 1})).view(-1).narrow(0, 0, count)));
  }
}

TEST_F(Nf4, NormalWeightsComeBackNearAndTakeABitMoreThanFourBits) {
  const at::Tensor weight = normal({256, 1024}, 0.02, "weight");
  for (const bool double_quant : {false, true}) {
    const Nf4Tensor tensor = quantize_nf4(weight, double_quant);
    const double error = ((restored(tensor) - weight).norm() / weight.norm()).item<double>();
    EXPECT_GT(error, 0.08);
    EXPECT_LT(error, 0.11);
    const double bits = 8 * static_cast<double>(tensor.num_bytes()) / static_cast<double>(weight.numel());
    EXPECT_DOUBLE_EQ(bits, double_quant ? 4 + 1.0 / 8 + 1.0 / 512 : 4.5);
    EXPECT_EQ(quantize_nf4(weight, double_quant, at::kMeta).num_bytes(), tensor.num_bytes());
  }
}

TEST_F(Nf4, WhatIsNotFiniteIsNotHidden) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const at::Tensor weight = normal({4, 64}, 1, "weight");
    weight[2][5] = bad;
    const at::Tensor back = restored(quantize_nf4(weight, false));
    EXPECT_TRUE(back[2].isnan().all().item<bool>());
    EXPECT_TRUE(back[1].isfinite().all().item<bool>());
  }
}

TEST_F(Nf4, TheLinearLayerAndItsGradientAreThoseOfTheRestoredWeight) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const bool double_quant : {false, true}) {
      SCOPED_TRACE(testing::Message() << dtype << double_quant);
      const at::Tensor first = normal({24, 40}, 0.5, "first"), second = normal({8, 40}, 2, "second");
      const Nf4Weight weight{{quantize_nf4(first, double_quant), quantize_nf4(second, double_quant)}};
      const at::Tensor whole = at::cat({restored(weight.parts[0], dtype), restored(weight.parts[1], dtype)});
      const at::Tensor bias = normal({32}, 1, "bias").to(dtype), x = normal({7, 40}, 1, "x").to(dtype),
                       dy = normal({7, 32}, 1, "dy").to(dtype);
      const at::Tensor leaf = x.clone().set_requires_grad(true), plain = x.clone().set_requires_grad(true);
      const at::Tensor y = affine_nf4(leaf, weight, bias), expected = affine(plain, whole, bias);
      EXPECT_TRUE(at::equal(y, expected));
      EXPECT_TRUE(at::equal(affine_nf4(x, weight, bias), expected));
      y.backward(dy);
      expected.backward(dy);
      EXPECT_TRUE(at::equal(leaf.grad(), plain.grad()));
    }
  }
}

// The gradient against differences of the layer itself.
TEST_F(Nf4, TheGradientIsTheSlope) {
  const Nf4Weight weight{{quantize_nf4(normal({9, 14}, 0.5, "weight"), true)}};
  const at::Tensor x = normal({3, 14}, 1, "x").set_requires_grad(true), dy = normal({3, 9}, 1, "dy");
  affine_nf4(x, weight).backward(dy);
  constexpr double kStep = 0.25;  // the layer is linear: no step is too large
  const at::NoGradGuard no_grad;
  for (int64_t i = 0; i < x.numel(); ++i) {
    const at::Tensor up = x.clone(), down = x.clone();
    up.view(-1)[i] += kStep;
    down.view(-1)[i] -= kStep;
    const double slope =
        ((affine_nf4(up, weight) - affine_nf4(down, weight)) * dy).sum().item<double>() / (2 * kStep);
    EXPECT_NEAR(x.grad().view(-1)[i].item<double>(), slope, 2e-5 * (1 + std::abs(slope))) << i;
  }
}

TEST_F(Nf4, ALinearLayerInFourBitsLearnsThroughItsAdaptersAlone) {
  Linear linear(32, {{"model.layers.0.self_attn.q_proj", 16}, {"model.layers.0.self_attn.k_proj", 8}}, true);
  NamedTensors tensors;
  linear.append_tensors(tensors);
  for (const NamedTensor& tensor : tensors) {
    at::Tensor value = tensor.value();
    init_normal_(value, 0.5, 1, tensor.name);
  }
  linear.attach({.lora_r = 2, .lora_dropout = 0}, 3);
  const at::Tensor x = normal({5, 32}, 1, "x").set_requires_grad(true);
  const at::Tensor before = linear.forward(x, {}).detach();
  linear.quantize_nf4(true, at::kCPU);
  EXPECT_EQ(linear.nf4()->parts.size(), 2u);

  NamedTensors left;
  linear.append_tensors(left);
  std::vector<at::Tensor> leaves;
  linear.append_leaves(leaves);
  EXPECT_EQ(leaves.size(), 5u);  // the bias and two adapters
  for (const NamedTensor& tensor : left)
    EXPECT_TRUE(is_lora_name(tensor.name) || tensor.name.ends_with(".bias")) << tensor.name;
  set_trainable(left, false);
  std::erase_if(left, [](const NamedTensor& tensor) { return !is_lora_name(tensor.name); });
  set_trainable(left, true);

  const at::Tensor y = linear.forward(x, {});
  const double error = ((y.detach() - before).norm() / before.norm()).item<double>();
  EXPECT_GT(error, 0.01);
  EXPECT_LT(error, 0.2);
  y.sum().backward();
  EXPECT_TRUE(x.grad().defined());
  for (const NamedTensor& tensor : left) EXPECT_TRUE(tensor.grad().defined()) << tensor.name;

  // Recomputed in the backward pass: the same bits.
  const at::Tensor again = x.detach().clone().set_requires_grad(true);
  recompute([&](const at::Tensor& in, bool) { return linear.forward(in, {}); }, again, leaves)
      .sum()
      .backward();
  EXPECT_TRUE(at::equal(again.grad(), x.grad()));
}

}  // namespace
}  // namespace caldera
