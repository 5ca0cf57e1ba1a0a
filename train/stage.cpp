#include "train/stage.h"

#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <string_view>
#include <unordered_set>

#include "base/error.h"
#include "base/files.h"
#include "model/ops/frozen_weights.h"
#include "model/vision/vit.h"
#include "model/weights/adapters.h"

namespace caldera {
namespace {

#ifdef CALDERA_CUDA
constexpr const char* kNoGpu = "no GPU is visible";
#else
constexpr const char* kNoGpu = "this build has no CUDA";
#endif

// Names of tensors that no feature depends on, in a transformer as a tower: the blocks behind the state that
// vision_feature_layer selects, the norm behind them all and the pooling head.
std::function<bool(const NamedTensor&)> behind_features(const LlavaModel& model) {
  const Json config = model.vision->config();
  if (!config.contains("num_hidden_layers")) return [](const NamedTensor&) { return false; };
  const int64_t used =
      num_blocks_before(model.features.vision_feature_layer, config["num_hidden_layers"].get<int64_t>());
  return [used](const NamedTensor& tensor) {
    constexpr std::string_view kRoot = "vision_tower.vision_model.", kBlocks = "encoder.layers.";
    if (!tensor.name.starts_with(kRoot)) return false;
    const std::string name = tensor.name.substr(kRoot.size());
    if (name.starts_with(kBlocks)) return std::stoll(name.substr(kBlocks.size())) >= used;
    return name.starts_with("post_layernorm.") || name.starts_with("head.");
  };
}

}  // namespace

at::Device choose_device(const std::string& device, int local_rank) {
  const bool has_gpu = at::hasCUDA() && at::detail::getCUDAHooks().deviceCount() > 0;
  CALDERA_CHECK(device != "cuda" || has_gpu, ConfigError, "device: cuda asked for, but {}", kNoGpu);
  if (!has_gpu || device == "cpu") return at::kCPU;
  const auto num_gpus = static_cast<int>(at::detail::getCUDAHooks().deviceCount());
  CALDERA_CHECK(local_rank < num_gpus, DistributedError,
                "local rank {} has no GPU of its own: this machine shows {}; start {} ranks", local_rank,
                num_gpus, num_gpus);
  return {at::kCUDA, static_cast<c10::DeviceIndex>(local_rank)};
}

bool trains_on_gpu(const Recipe& recipe) {
  return recipe.device == "cuda" || choose_device(recipe.device).is_cuda();
}

void synchronize(at::Device device) {
  if (device.is_cuda()) at::detail::getCUDAHooks().deviceSynchronize(std::max<c10::DeviceIndex>(device.index(), 0));
}

at::ScalarType parse_dtype(const std::string& dtype) {
  if (dtype == "float32") return at::kFloat;
  CALDERA_CHECK(dtype == "bfloat16", ConfigError, "dtype: expected float32 or bfloat16, got \"{}\"", dtype);
  return at::kBFloat16;
}

BuildSpec build_spec_of(const Recipe& recipe, size_t stage_index) {
  BuildSpec spec;
  spec.vision_tower = fs::absolute(recipe.model.vision_tower).string();
  spec.language_model = fs::absolute(recipe.model.language_model).string();
  spec.mm_projector_type = recipe.model.mm_projector_type;
  spec.features = {recipe.model.vision_feature_layer, recipe.model.vision_feature_select_strategy};
  spec.image_size = recipe.model.image_size;
  spec.seed = recipe.seed;
  if (const std::string& projector = recipe.model.pretrain_mm_mlp_adapter; !projector.empty())
    spec.overlays.push_back({fs::absolute(projector).string(), {"projector"}});
  for (size_t i = 0; i < stage_index; ++i) {
    const StageConfig& earlier = recipe.stages[i];
    spec.overlays.push_back(
        {(fs::absolute(recipe.output) / earlier.name / "final").string(), earlier.trainable});
  }
  if (recipe.stages[stage_index].uses_lora()) spec.lora = *recipe.stages[stage_index].lora;
  return spec;
}

std::string recipe_part(const Recipe& recipe, const StageConfig& stage) {
  Recipe part;
  part.model = recipe.model;
  part.stages = {stage};
  part.seed = recipe.seed;
  return dump_recipe(part);
}

std::string tokenizer_of(const Recipe& recipe) {
  return fs::absolute(recipe.model.tokenizer.empty() ? recipe.model.language_model : recipe.model.tokenizer)
      .string();
}

std::vector<ParameterGroup> parameter_groups(LlavaModel& model, const StageConfig& stage) {
  std::vector<ParameterGroup> groups;
  for (const std::string& part : stage.trainable) {
    double learning_rate = stage.optimizer.learning_rate;
    if (part == "projector") learning_rate = stage.optimizer.mm_projector_lr.value_or(learning_rate);
    if (part == "vision_tower") learning_rate = stage.optimizer.vision_tower_lr.value_or(learning_rate);
    groups.push_back({part, learning_rate, model.component_tensors(part)});
    if (part == "language_model" && stage.uses_lora())
      std::erase_if(groups.back().tensors,
                    [](const NamedTensor& tensor) { return !is_lora_name(tensor.name); });
    // torch leaves alone what has no gradient, weight decay included: neither states nor messages are needed
    // for it.
    if (part == "vision_tower") std::erase_if(groups.back().tensors, behind_features(model));
  }
  return groups;
}

std::string trainable_warning(const StageConfig& stage, const std::vector<Record>& records) {
  const auto has_picture = [](const Record& record) { return !record.images.empty(); };
  if (std::any_of(records.begin(), records.end(), has_picture)) return "";
  std::vector<std::string> idle = stage.trainable;
  std::erase(idle, "language_model");
  if (idle.empty()) return "";
  return fmt::format(
      "stages.{}.trainable: {} cannot learn from {}, none of whose {} records has a picture; leave it out, "
      "or name data "
      "with pictures",
      stage.name, fmt::join(idle, " and "), stage.data.data_path, records.size());
}

// Matrices that products read: the tower's and the head forward, others for the gradients of their inputs as well.
int64_t frozen_copy_bytes(LlavaModel& model, const std::vector<ParameterGroup>& groups, at::ScalarType dtype) {
  std::unordered_set<const at::Tensor*> seen;
  for (const ParameterGroup& group : groups)
    for (const NamedTensor& tensor : group.tensors) seen.insert(tensor.owner);
  const at::Tensor* head = &model.language->head_weight();
  int64_t bytes = 0;
  for (const NamedTensor& tensor : model.tensors()) {
    const bool is_looked_up =
        (tensor.name.ends_with("position_embedding.weight") || tensor.name.ends_with("embed_tokens.weight")) &&
        tensor.owner != head;
    if (tensor.owner->dim() != 2 || is_looked_up || !seen.insert(tensor.owner).second) continue;
    const bool only_forward = tensor.name.starts_with("vision_tower") || tensor.owner == head;
    bytes += frozen_bytes_each(dtype, only_forward) * tensor.owner->numel();
  }
  return bytes;
}

}  // namespace caldera
