// A whole model of a few thousand weights for tests: a tower that averages squares of pixels, a projector, a
// small llama.
#pragma once
#include <memory>

#include "base/error.h"
#include "base/words.h"
#include "model/llava.h"
#include "tests/aten.h"

namespace caldera {

// Pictures of 8 x 8 pixels give 4 features: the means of the quarters' colours, times a trainable [3, 3]
// matrix.
class TinyTower : public VisionTower {
 public:
  at::Tensor forward(const at::Tensor& pixels_ICYX) override {
    const at::Tensor x = at::avg_pool2d(pixels_ICYX.to(weight_.scalar_type()) / 255, 4);
    return x.flatten(2).transpose(1, 2).matmul(weight_);
  }
  NamedTensors tensors() override { return {{"weight", &weight_}}; }
  void set_image_size(int64_t) override {}
  ImageSpec image_spec() const override { return {.image_size = 8, .num_image_tokens = 4}; }
  int64_t hidden_size() const override { return 3; }
  Json config() const override { return {{"model_type", "tiny"}}; }
  const char* id() const override { return "tiny"; }

 private:
  at::Tensor weight_ = at::eye(3);
};

inline std::unique_ptr<LlavaModel> make_tiny_llava(uint64_t seed = 1) {
  const Json config = {{"vocab_size", 40},        {"hidden_size", 32},        {"intermediate_size", 48},
                       {"num_hidden_layers", 2},  {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                       {"initializer_range", 0.3}};
  auto model = std::make_unique<LlavaModel>();
  model->vision = std::make_unique<TinyTower>();
  model->projector = make_projector("mlp2x_gelu", 3, 32);
  init_projector(*model->projector, seed);
  const LanguageModelSpec& spec = find_language_model("llama", "test");
  model->language = spec.make(config);
  spec.init(*model->language, seed);
  return model;
}

// A packed batch of samples; an image takes 4 places of kImageTokenIndex in a sample's ids. All positions
// whose next id is a real one are supervised.
inline PackedBatch make_batch(const std::vector<std::vector<int64_t>>& samples) {
  std::vector<int64_t> ids, positions, supervised, targets, image_rows;
  PackedBatch batch;
  batch.cu_seqlens = {0};
  for (const std::vector<int64_t>& sample : samples) {
    batch.num_supervised.push_back(0);
    for (size_t i = 0; i < sample.size(); ++i) {
      if (sample[i] == kImageTokenIndex) image_rows.push_back(static_cast<int64_t>(ids.size()));
      if (i + 1 < sample.size() && sample[i + 1] != kImageTokenIndex) {
        supervised.push_back(static_cast<int64_t>(ids.size()));
        targets.push_back(sample[i + 1]);
        ++batch.num_supervised.back();
      }
      positions.push_back(static_cast<int64_t>(i));
      ids.push_back(sample[i]);
    }
    batch.cu_seqlens.push_back(static_cast<int64_t>(ids.size()));
  }
  const auto tensor = [](const std::vector<int64_t>& values) { return at::tensor(values, at::kLong); };
  batch.input_ids_T = tensor(ids);
  batch.position_ids_T = tensor(positions);
  batch.supervised_K = tensor(supervised);
  batch.targets_K = tensor(targets);
  batch.image_rows_IP = tensor(image_rows);
  const int64_t num_images = batch.image_rows_IP.numel() / 4;
  batch.pixels_ICYX =
      (at::arange(num_images * 3 * 8 * 8) * 37 % 256).to(at::kByte).view({num_images, 3, 8, 8});
  return batch;
}

inline constexpr int64_t kImage = kImageTokenIndex;

}  // namespace caldera
