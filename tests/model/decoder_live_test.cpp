// Random decoders of odd sizes against what transformers computed with them just now:
// tests/parity/decoders.py makes the folders, in CALDERA_DECODERS. Without it there is nothing to compare
// with; decoder_test has checked-in numbers.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "base/files.h"
#include "model/ops/ops.h"
#include "model/weights/load.h"

namespace caldera {
namespace {

struct Expected {
  explicit Expected(const fs::path& folder) : file(open_safetensors(folder / "expected.safetensors")) {
    std::vector<at::Tensor> counts;
    const at::Tensor lengths = get("lengths");
    for (int64_t s = 0; s < lengths.numel(); ++s) {
      const auto length = lengths[s].item<int64_t>();
      counts.push_back(at::arange(length));
      cu_seqlens.push_back(cu_seqlens.back() + length);
    }
    positions = at::cat(counts);
  }
  at::Tensor get(const std::string& name) const { return file->read(name).clone(); }
  at::Tensor logits(LanguageModel& model) const {
    const at::NoGradGuard no_grad;
    const at::Tensor hidden = model.forward(model.embed(get("ids")), positions, cu_seqlens, {});
    return at::linear(hidden, model.head_weight()).to(at::kFloat);
  }

  std::unique_ptr<TensorSource> file;
  std::vector<int64_t> cu_seqlens = {0};
  at::Tensor positions;
};

// Largest difference, relative to the largest value of what is expected, or to `floor` where that is smaller.
double live_error(const at::Tensor& got, const at::Tensor& expected, double floor = 1e-30) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  return ((got - expected).abs().max() / expected.abs().max().clamp_min(floor)).item<double>();
}

TEST(DecoderLive, EveryFamilyIsAsTransformersHasIt) {
  const char* folder = std::getenv("CALDERA_DECODERS");
  if (folder == nullptr) GTEST_SKIP() << "CALDERA_DECODERS names no folder";
  std::map<std::string, std::pair<double, double>> worst;  // by what is compared: error, bound
  const auto record = [&](const std::string& what, double error, double bound, const std::string& where) {
    EXPECT_LT(error, bound) << where;
    worst[what] = {std::max(worst[what].first, error), bound};
  };
  double ours_bf16 = 0, theirs_bf16 = 0;
  int num_models = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const Expected expected(entry.path());
    const at::Tensor logits = expected.get("logits");
    const auto model = load_language_model(entry.path());
    record("logits", live_error(expected.logits(*model), logits), 1e-5, name);
    if (fs::exists(entry.path() / "model.gguf"))
      record("logits of GGUF",
             live_error(expected.logits(*load_language_model(entry.path() / "model.gguf")), logits), 1e-5,
             name);

    const NamedTensors tensors = model->tensors();
    set_trainable(tensors, true);
    const at::Tensor hidden = model->forward(model->embed(expected.get("ids")), expected.positions,
                                             expected.cu_seqlens, expected.get("supervised"));
    const at::Tensor loss = linear_cross_entropy(hidden, model->head_weight(), expected.get("targets"));
    record("loss", live_error(loss.detach(), expected.get("loss")), 1e-5, name);
    loss.backward();
    double largest = 0;
    for (const NamedTensor& tensor : tensors)
      largest = std::max(largest, tensor.grad().abs().max().item<double>());
    for (const NamedTensor& tensor :
         tensors)  // one that all but cancels (a key's bias) is mere rounding by itself
      record("gradients", live_error(tensor.grad(), expected.get("grad." + tensor.name), 1e-3 * largest),
             1e-4, name + ": " + tensor.name);

    convert(tensors, at::kCPU, at::kBFloat16);
    ours_bf16 += (expected.logits(*model) - logits).norm().item<double>() / logits.norm().item<double>();
    theirs_bf16 +=
        (expected.get("logits_bf16") - logits).norm().item<double>() / logits.norm().item<double>();
    ++num_models;
  }
  EXPECT_GE(num_models, 20);
  EXPECT_LE(ours_bf16,
            theirs_bf16);  // no further from float32 than transformers' own bfloat16 is, over all models
  for (const auto& [what, error] : worst)
    fmt::print("{}: worst relative difference {:.1e} (bound {:.0e})\n", what, error.first, error.second);
  fmt::print(
      "bfloat16 logits, mean relative distance from float32 over {} models: {:.2e}; transformers' {:.2e}\n",
      num_models, ours_bf16 / num_models, theirs_bf16 / num_models);
}

}  // namespace
}  // namespace caldera
