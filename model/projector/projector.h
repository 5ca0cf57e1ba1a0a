// The projector: tower features [.., Dv] -> language model width [.., D]. LLaVA's mm_projector_type names: "linear",
// "mlpNx_gelu" (Linear, then N - 1 times exact GELU and Linear), "identity".
#pragma once

#include <memory>
#include <string>

#include "base/aten.h"
#include "model/module.h"

namespace caldera {

class Projector {
 public:
  virtual ~Projector() = default;
  virtual at::Tensor forward(const at::Tensor& features) = 0;
  // Names as HF's multi_modal_projector: "linear_1.weight", "linear_1.bias", "linear_2.weight", ...
  // ("linear" alone is linear_1, identity has none).
  virtual NamedTensors tensors() = 0;
};

// Throws ConfigError for an unknown type (naming the known ones), and for identity where the widths differ.
std::unique_ptr<Projector> make_projector(const std::string& mm_projector_type, int64_t vision_width,
                                          int64_t language_width);
// torch.nn.Linear's initialisation (uniform +-1/sqrt(fan_in)), as LLaVA leaves it.
void init_projector(Projector& projector, uint64_t seed);

}  // namespace caldera
