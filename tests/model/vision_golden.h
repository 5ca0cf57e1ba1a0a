// Towers with a golden's weights.
#pragma once
#include <gtest/gtest.h>

#include <memory>

#include "model/vision/tower.h"
#include "model/weights/load.h"
#include "tests/aten.h"

namespace caldera {

inline std::unique_ptr<VisionTower> make_tower(const Json& config, const VisionFeatures& features = {},
                                               const Json& preprocessor = Json::object()) {
  return find_vision_tower(config["model_type"].get<std::string>(), "test")
      .make(config, preprocessor, features);
}

inline std::unique_ptr<VisionTower> golden_tower(const Json& config, const TensorSource& golden,
                                                 const VisionFeatures& features = {}) {
  std::unique_ptr<VisionTower> tower = make_tower(config, features);
  load_tensors(tower->tensors(), golden, [](const std::string& name) { return "weights." + name; });
  return tower;
}

inline double max_difference(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace caldera
