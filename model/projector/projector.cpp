#include "model/projector/projector.h"

#include <cmath>
#include <optional>

#include "base/error.h"
#include "base/strings.h"
#include "model/ops/matmul.h"
#include "model/ops/ops.h"

namespace caldera {
namespace {

// Linear, then (depth - 1) times exact GELU and Linear; depth 0 is the identity.
class MlpProjector : public Projector {
 public:
  MlpProjector(size_t depth, int64_t vision_width, int64_t language_width) : weights_(depth), biases_(depth) {
    for (size_t i = 0; i < depth; ++i) {
      weights_[i] = at::empty({language_width, i == 0 ? vision_width : language_width}, at::kFloat);
      biases_[i] = at::empty({language_width}, at::kFloat);
    }
  }

  at::Tensor forward(const at::Tensor& features) override {
    const auto activate = [](const at::Tensor& hidden) { return at::gelu(hidden); };
    at::Tensor x = features;
    for (size_t i = 0; i < weights_.size(); ++i) {
      // Of a layer's result and its activation the one is kept, and gives the other again.
      x = i == 0 ? affine(x, weights_[i], biases_[i]) : affine_of(activate, x, weights_[i], biases_[i]);
    }
    return x;
  }

  NamedTensors tensors() override {
    NamedTensors list;
    for (size_t i = 0; i < weights_.size(); ++i) {
      list.push_back({fmt::format("linear_{}.weight", i + 1), &weights_[i]});
      list.push_back({fmt::format("linear_{}.bias", i + 1), &biases_[i]});
    }
    return list;
  }

 private:
  std::vector<at::Tensor> weights_, biases_;
};

// "linear" is 1, "mlp3x_gelu" 3, "identity" 0; nothing for any other text.
std::optional<size_t> depth_of(const std::string& type) {
  if (type == "identity") return 0;
  if (type == "linear") return 1;
  const bool mlp = type.size() == 10 && type.starts_with("mlp") && type.ends_with("x_gelu");
  if (mlp && type[3] >= '1' && type[3] <= '9') return static_cast<size_t>(type[3] - '0');
  return {};
}

}  // namespace

std::unique_ptr<Projector> make_projector(const std::string& mm_projector_type, int64_t vision_width,
                                          int64_t language_width) {
  const std::optional<size_t> depth = depth_of(mm_projector_type);
  CALDERA_CHECK(depth, ConfigError, "mm_projector_type \"{}\" is not known{}", mm_projector_type,
                suggestion(mm_projector_type, {"linear", "mlp2x_gelu", "mlp3x_gelu", "identity"}));
  CALDERA_CHECK(*depth > 0 || vision_width == language_width, ConfigError,
                "mm_projector_type \"identity\" needs equal widths, but the vision tower's features have {} "
                "and the language "
                "model {}; use \"linear\" or \"mlp2x_gelu\"",
                vision_width, language_width);
  return std::make_unique<MlpProjector>(*depth, vision_width, language_width);
}

void init_projector(Projector& projector, uint64_t seed) {
  int64_t fan_in = 1;
  for (const NamedTensor& tensor : projector.tensors()) {  // each weight comes before its bias
    at::Tensor value = tensor.value();
    if (value.dim() == 2) fan_in = value.size(1);
    init_uniform_(value, 1 / std::sqrt(static_cast<double>(fan_in)), seed,
                  "multi_modal_projector." + tensor.name);
  }
}

}  // namespace caldera
