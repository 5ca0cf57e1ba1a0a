// Random whole models of odd sizes against what transformers computed with them just now:
// tests/parity/llavas.py makes the folders, in CALDERA_LLAVAS. Without it there is nothing to compare with.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>

#include "base/files.h"
#include "model/weights/load.h"
#include "model/weights/names.h"

namespace caldera {
namespace {

PackedBatch batch_of(const TensorSource& expected) {
  const auto get = [&](const char* name) { return expected.read(name).clone(); };
  PackedBatch batch;
  batch.input_ids_T = get("ids");
  batch.cu_seqlens = {0};
  std::vector<at::Tensor> positions;
  const at::Tensor lengths = get("lengths");
  for (int64_t s = 0; s < lengths.numel(); ++s) {
    const auto length = lengths[s].item<int64_t>();
    positions.push_back(at::arange(length));
    batch.cu_seqlens.push_back(batch.cu_seqlens.back() + length);
  }
  batch.position_ids_T = at::cat(positions);
  batch.supervised_K = get("supervised");
  batch.targets_K = get("targets");
  batch.image_rows_IP = get("image_rows");
  batch.pixels_ICYX = get("pixels");
  return batch;
}

// Largest difference, relative to the largest value of what is expected, or to `floor` where that is smaller.
double relative_error(const at::Tensor& got, const at::Tensor& expected, double floor = 1e-30) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  return ((got - expected).abs().max() / expected.abs().max().clamp_min(floor)).item<double>();
}

TEST(LlavaLive, EveryTowerWithEveryDecoderIsAsTransformersHasIt) {
  const char* folder = std::getenv("CALDERA_LLAVAS");
  if (folder == nullptr) GTEST_SKIP() << "CALDERA_LLAVAS names no folder";
  std::map<std::string, std::pair<double, std::string>> worst;  // by what is compared: error and where
  const auto record = [&](const std::string& what, double error, double bound, const std::string& where) {
    EXPECT_LT(error, bound) << where;
    if (error >= worst[what].first) worst[what] = {error, where};
  };
  double ours_bf16 = 0, theirs_bf16 = 0;
  int num_models = 0;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    const auto expected = open_safetensors(entry.path() / "expected"),
               gradients = open_safetensors(entry.path() / "gradients");
    const PackedBatch batch = batch_of(*expected);
    LoadedModel loaded = load_llava(entry.path());
    LlavaModel& model = *loaded.model;
    const at::Tensor logits = expected->read("logits").clone();
    record("logits", relative_error(model.logits(batch), logits), 1e-5, name);

    const NamedTensors tensors = model.tensors();
    set_trainable(tensors, true);
    const at::Tensor loss = model.loss_sum(batch);
    record("loss", relative_error(loss.detach(), expected->read("loss")), 1e-5, name);
    loss.backward();
    std::map<std::string, double> largest;  // of each part
    const auto part = [](const std::string& tensor) { return tensor.substr(0, tensor.find('.')); };
    for (const NamedTensor& tensor : tensors)
      if (tensor.grad().defined())
        largest[part(tensor.name)] =
            std::max(largest[part(tensor.name)], tensor.grad().abs().max().item<double>());
    size_t compared = 0;
    for (const NamedTensor& tensor : tensors) {
      const std::string theirs = find_llava_name(tensor.name, *gradients);
      if (!gradients->has(theirs)) {  // behind the feature layer
        EXPECT_TRUE(!tensor.grad().defined() || tensor.grad().abs().max().item<double>() == 0)
            << name << ": " << tensor.name;
        continue;
      }
      ++compared;  // that of a key's bias is zero but for rounding: softmax does not see it
      record(part(tensor.name) + ": gradients",
             relative_error(tensor.grad(), gradients->read(theirs), 1e-2 * largest[part(tensor.name)]), 1e-4,
             name + ": " + tensor.name);
    }
    EXPECT_EQ(compared, gradients->names().size()) << name;

    model.to(at::kCPU, at::kBFloat16);
    ours_bf16 += (model.logits(batch) - logits).norm().item<double>() / logits.norm().item<double>();
    theirs_bf16 +=
        (expected->read("logits_bf16") - logits).norm().item<double>() / logits.norm().item<double>();
    ++num_models;
  }
  EXPECT_GE(num_models, 8);
  EXPECT_LE(ours_bf16,
            theirs_bf16);  // no further from float32 than transformers' own bfloat16 is, over all models
  for (const auto& [what, error] : worst)
    fmt::print("{}: worst relative difference {:.1e} ({})\n", what, error.first, error.second);
  fmt::print(
      "bfloat16 logits, mean relative distance from float32 over {} models: {:.2e}; transformers' {:.2e}\n",
      num_models, ours_bf16 / num_models, theirs_bf16 / num_models);
}

}  // namespace
}  // namespace caldera
