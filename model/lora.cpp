#include "model/lora.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"

namespace caldera {
namespace {

std::string last_part(const std::string& name) { return name.substr(name.rfind('.') + 1); }

}  // namespace

double LoraConfig::scaling() const {
  const auto rank = static_cast<double>(lora_r);
  return lora_alpha / (use_rslora ? std::sqrt(rank) : rank);
}

Json to_json(const LoraConfig& config) {
  return {{"lora_r", config.lora_r},
          {"lora_alpha", config.lora_alpha},
          {"lora_dropout", config.lora_dropout},
          {"use_rslora", config.use_rslora},
          {"target_modules", config.target_modules}};
}

LoraConfig lora_config_from_json(const Json& json, const std::string& where) {
  try {
    LoraConfig config{.lora_r = json.at("lora_r").get<int64_t>(),
                      .lora_alpha = json.at("lora_alpha").get<double>(),
                      .lora_dropout = json.at("lora_dropout").get<double>(),
                      .use_rslora = json.at("use_rslora").get<bool>(),
                      .target_modules = json.at("target_modules").get<std::vector<std::string>>()};
    CALDERA_CHECK(config.lora_r > 0 && config.lora_r < (1 << 20), CheckpointError,
                  "{}: lora_r: expected a positive rank, got {}", where, config.lora_r);
    return config;
  } catch (const nlohmann::json::exception& error) {
    throw CheckpointError(fmt::format("{}: {}", where, error.what()));
  }
}

bool is_lora_name(const std::string& name) {
  return name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight");
}

Linear::Linear(int64_t num_inputs, std::vector<Module> modules, bool has_bias)
    : modules_(std::move(modules)) {
  const int64_t num_rows =
      std::accumulate(modules_.begin(), modules_.end(), int64_t{0},
                      [](int64_t sum, const Module& module) { return sum + module.num_rows; });
  weight_OI_ = at::empty({num_rows, num_inputs}, at::kFloat);
  if (has_bias) bias_O_ = at::empty({num_rows}, at::kFloat);
}

at::Tensor dropout_keys(const PackedBatch& batch, uint64_t seed) {
  CALDERA_ASSERT(std::ssize(batch.sample_numbers) == batch.num_samples());
  at::Tensor keys_T = at::empty({batch.num_tokens()}, at::kLong);
  auto* key = keys_T.mutable_data_ptr<int64_t>();
  for (size_t s = 0; s < batch.sample_numbers.size(); ++s) {
    const int64_t length = batch.cu_seqlens[s + 1] - batch.cu_seqlens[s];
    for (int64_t i = 0; i < length; ++i)
      *key++ = static_cast<int64_t>(Rng(seed, batch.sample_numbers[s], i).next());
  }
  return keys_T.to(batch.input_ids_T.device(), /*non_blocking=*/true);
}

at::Tensor Linear::forward(const at::Tensor& x_TI, const at::Tensor& dropout_keys_T, bool needs_value) const {
  if (int8_) return affine_int8(x_TI, *int8_, bias_O_);
  at::Tensor y_TO = nf4_ ? affine_nf4(x_TI, *nf4_, bias_O_, needs_value)
                         : affine(x_TI, weight_OI_, bias_O_, needs_value, in_float8_);
  if (adapters_.empty()) return y_TO;
  std::vector<LowRankUpdate> updates;
  int64_t first_row = 0;
  for (size_t i = 0; i < modules_.size(); first_row += modules_[i++].num_rows) {
    if (adapters_[i].a_RI.defined())
      updates.push_back({adapters_[i].a_RI, adapters_[i].b_OR, first_row, hash_text(modules_[i].name)});
  }
  // In place: nothing of y is kept for backward.
  return add_low_rank_(y_TO, x_TI, updates, scaling_,
                       {dropout_keys_T.defined() ? dropout_ : 0, dropout_keys_T}, needs_value);
}

at::Tensor Linear::forward_of(const std::function<at::Tensor(const at::Tensor&)>& make,
                              const at::Tensor& source, const at::Tensor& dropout_keys_T,
                              bool needs_value) const {
  if (is_plain()) return affine_of(make, source, weight_OI_, bias_O_, needs_value, in_float8_);
  return forward(make(source), dropout_keys_T, needs_value);
}

WithResidual Linear::forward_of_norm(const at::Tensor& residual, const at::Tensor& update,
                                     const at::Tensor& norm, double eps,
                                     const at::Tensor& dropout_keys_T) const {
  if (is_plain()) return affine_of_norm(residual, update, norm, eps, weight_OI_, bias_O_, in_float8_);
  const auto [normed, sum] = add_rms_norm(residual, update, norm, eps);
  return {forward(normed, dropout_keys_T), sum};
}

void Linear::append_tensors(NamedTensors& list) {
  for (const char* kind : {"weight", "bias"}) {
    at::Tensor& owner = kind == std::string("weight") ? weight_OI_ : bias_O_;
    int64_t begin = 0;
    for (const Module& module : modules_) {
      // A matrix that is one module's is listed whole.
      if (owner.defined())
        list.push_back(
            {module.name + "." + kind, &owner, begin, modules_.size() == 1 ? -1 : module.num_rows});
      begin += module.num_rows;
    }
  }
  for (size_t i = 0; i < adapters_.size(); ++i) {
    if (!adapters_[i].a_RI.defined()) continue;
    list.push_back({modules_[i].name + ".lora_A.weight", &adapters_[i].a_RI});
    list.push_back({modules_[i].name + ".lora_B.weight", &adapters_[i].b_OR});
  }
}

void Linear::append_leaves(std::vector<at::Tensor>& list) const {
  if (weight_OI_.defined()) list.push_back(weight_OI_);
  if (bias_O_.defined()) list.push_back(bias_O_);
  for (const Adapter& adapter : adapters_)
    if (adapter.a_RI.defined()) list.insert(list.end(), {adapter.a_RI, adapter.b_OR});
}

void Linear::attach(const LoraConfig& config, uint64_t seed) {
  CALDERA_ASSERT(adapters_.empty());
  const auto is_target = [&](const Module& module) {
    const std::vector<std::string>& targets = config.target_modules;
    return targets.empty() ||
           std::find(targets.begin(), targets.end(), last_part(module.name)) != targets.end();
  };
  if (std::none_of(modules_.begin(), modules_.end(), is_target)) return;
  scaling_ = config.scaling();
  dropout_ = config.lora_dropout;
  adapters_.resize(modules_.size());
  for (size_t i = 0; i < modules_.size(); ++i) {
    if (!is_target(modules_[i])) continue;
    Adapter& adapter = adapters_[i];
    adapter.a_RI = at::empty({config.lora_r, weight_OI_.size(1)}, weight_OI_.options());
    adapter.b_OR = at::zeros({modules_[i].num_rows, config.lora_r}, weight_OI_.options());
    init_uniform_(adapter.a_RI, 1 / std::sqrt(static_cast<double>(weight_OI_.size(1))), seed,
                  modules_[i].name + ".lora_A.weight");
  }
}

void Linear::quantize_int8() {
  CALDERA_ASSERT(adapters_.empty());
  int8_ = caldera::quantize_int8(weight_OI_);
  weight_OI_ = at::Tensor();
}

void Linear::quantize_nf4(bool double_quant, at::Device device) {
  Nf4Weight weight;
  int64_t begin = 0;
  for (const Module& module : modules_) {
    weight.parts.push_back(
        caldera::quantize_nf4(weight_OI_.narrow(0, begin, module.num_rows), double_quant, device));
    begin += module.num_rows;
  }
  nf4_ = std::move(weight);
  weight_OI_ = at::Tensor();
}

void Linear::use_float8() {
  CALDERA_ASSERT(!nf4_ && !int8_);
  const int64_t num_outputs = weight_OI_.size(0), num_inputs = weight_OI_.size(1);
  CALDERA_CHECK(num_outputs % 16 == 0 && num_inputs % 16 == 0, ConfigError,
                "float8: true: {} has {} inputs, and {} outputs with those that share its product; both must be "
                "multiples of 16",
                modules_[0].name, num_inputs, num_outputs);
  in_float8_ = true;
}

void Linear::merge() {
  CALDERA_ASSERT(!nf4_);
  const at::NoGradGuard no_grad;
  int64_t begin = 0;
  for (size_t i = 0; i < adapters_.size(); begin += modules_[i++].num_rows) {
    const Adapter& adapter = adapters_[i];
    if (!adapter.a_RI.defined()) continue;
    at::Tensor rows = weight_OI_.detach().narrow(0, begin, modules_[i].num_rows);
    rows.copy_(rows.to(at::kFloat) +
               at::mm(adapter.b_OR.to(at::kFloat), adapter.a_RI.to(at::kFloat)) * scaling_);
  }
  merged_ = std::move(adapters_);  // their addresses stay good: an optimizer may still list them
  adapters_.clear();
}

}  // namespace caldera
