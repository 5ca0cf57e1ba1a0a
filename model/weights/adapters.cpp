#include "model/weights/adapters.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <set>

#include "base/error.h"
#include "base/headway.h"
#include "base/strings.h"
#include "model/weights/checks.h"
#include "model/weights/json_fields.h"

namespace caldera {
namespace {

constexpr std::string_view kA = ".lora_A.weight", kB = ".lora_B.weight";

struct Rule {
  std::string_view from, to;
};

std::string replaced_prefix(const std::string& name, std::span<const Rule> rules) {
  for (const Rule& rule : rules)
    if (name.starts_with(rule.from)) return std::string(rule.to) + name.substr(rule.from.size());
  return name;
}

// The name without what wrappers put into it: torch.compile, FSDP, and PEFT's name of the adapter where a
// training saved the model's own dictionary.
std::string without_wrappers(const std::string& name) {
  std::string plain = replace_all(name, "_orig_mod.", "");
  plain = replace_all(std::move(plain), "_fsdp_wrapped_module.", "");
  for (const char* matrix : {".lora_A", ".lora_B"})
    plain = replace_all(std::move(plain), std::string(matrix) + ".default.", std::string(matrix) + ".");
  return plain;
}

// A name of an adapter file as the classic one, whichever model it begins at.
std::string classic_name(const std::string& name) {
  static constexpr Rule kWrapper[] = {{"base_model.model.", ""}};
  static constexpr Rule kRules[] = {{"model.language_model.", "language_model.model."},
                                    {"model.multi_modal_projector.", "multi_modal_projector."},
                                    {"model.vision_tower.vision_tower.", "vision_tower."},
                                    {"model.vision_tower.", "vision_tower."},
                                    {"model.", "language_model.model."},
                                    {"lm_head.", "language_model.lm_head."}};
  const std::string inner = replaced_prefix(without_wrappers(name), kWrapper);
  constexpr std::string_view kProjector = "model.mm_projector.";
  if (!inner.starts_with(kProjector)) return replaced_prefix(inner, kRules);
  // Layer k is child 2(k - 1) of a Sequential; an only layer is the projector itself.
  std::string_view field = std::string_view(inner).substr(kProjector.size());
  int child = 0;
  const auto parsed = std::from_chars(field.begin(), field.end(), child);
  if (parsed.ec == std::errc() && parsed.ptr != field.end()) field.remove_prefix(parsed.ptr + 1 - field.begin());
  return fmt::format("multi_modal_projector.linear_{}.{}", child / 2 + 1, field);
}

// A classic name as PEFT has it around transformers 5's LlavaForConditionalGeneration, or around the decoder
// alone.
std::string peft_name(const std::string& classic, bool for_decoder) {
  static constexpr Rule kDecoder[] = {{"language_model.", "base_model.model."}};
  static constexpr Rule kRules[] = {{"language_model.model.", "base_model.model.model.language_model."},
                                    {"language_model.", "base_model.model."},
                                    {"vision_tower.vision_model.", "base_model.model.model.vision_tower."},
                                    {"", "base_model.model.model."}};
  return for_decoder ? replaced_prefix(classic, kDecoder) : replaced_prefix(classic, kRules);
}

LoraConfig lora_of_peft(const Json& config, const std::string& where) {
  const auto refuse_unless = [&](bool holds, const char* key) {
    CALDERA_CHECK(holds, CheckpointError,
                  "{}: {}: {} is not supported; merge the adapter with PEFT (merge_and_unload) first", where,
                  key, json_line(config[key]));
  };
  const auto is_off = [&](const char* key) {
    return !config.contains(key) || config[key].is_null() || config[key] == false || config[key].empty();
  };
  CALDERA_CHECK(config.contains("peft_type") && config["peft_type"] == "LORA", CheckpointError,
                "{}: peft_type: expected LORA, got {}", where, json_line(config.value("peft_type", Json())));
  refuse_unless(text_field(config, where, "bias", "none") == "none", "bias");
  // Settings that change nothing once the weights are there. Any other may change what is computed (patterns
  // of ranks, aLoRA's tokens, what a later PEFT brings), and must be off.
  static const std::set<std::string> kHarmless = {"auto_mapping",
                                                  "base_model_name_or_path",
                                                  "bias",
                                                  "eva_config",
                                                  "exclude_modules",
                                                  "inference_mode",
                                                  "init_lora_weights",
                                                  "layers_pattern",
                                                  "layers_to_transform",
                                                  "lora_alpha",
                                                  "lora_dropout",
                                                  "megatron_core",
                                                  "modules_to_save",
                                                  "peft_type",
                                                  "peft_version",
                                                  "qalora_group_size",
                                                  "r",
                                                  "revision",
                                                  "runtime_config",
                                                  "target_modules",
                                                  "task_type",
                                                  "use_rslora"};
  for (const auto& [key, value] : config.items())
    refuse_unless(kHarmless.contains(key) || is_off(key.c_str()), key.c_str());
  // PEFT changes the base's weights before it adds an adapter that began as PiSSA, OLoRA or LoftQ.
  static const std::set<std::string> kPlain = {"gaussian", "orthogonal", "eva"};
  const Json init = config.value("init_lora_weights", Json(true));
  refuse_unless(!init.is_string() || kPlain.contains(init.get<std::string>()), "init_lora_weights");
  LoraConfig lora;
  lora.lora_r = integer_field(config, where, "r", 8, 1, 1 << 20);
  lora.lora_alpha = number_field(config, where, "lora_alpha", 8);
  lora.lora_dropout = number_field(config, where, "lora_dropout", 0);
  lora.use_rslora = boolean_field(config, where, "use_rslora", false);
  return lora;
}

void append_tensors(Adapter& adapter, const fs::path& file) {
  const std::unique_ptr<TensorSource> source = open_weights_file(file);
  std::set<std::string> seen;
  for (const auto& [name, tensor] : adapter.tensors) seen.insert(name);
  for (const std::string& name : source->names()) {
    const std::string classic = classic_name(name);
    CALDERA_CHECK(seen.insert(classic).second, CheckpointError, "{}: {}: a second tensor for {}",
                  file.string(), name, classic);
    const at::Tensor value = source->read(name).clone();
    check_finite(value, file.string(), name);
    adapter.tensors.emplace_back(classic, value);
  }
}

// Without a pair of matrices the base would be taken for the tuned model.
void expect_matrices(const Adapter& adapter, const fs::path& file) {
  const bool has_any = std::any_of(adapter.tensors.begin(), adapter.tensors.end(),
                                   [](const auto& named) { return is_lora_name(named.first); });
  CALDERA_CHECK(
      has_any, CheckpointError,
      "{}: holds no tensors of an adapter ({} tensors in all): expected names that end in lora_A.weight and "
      "lora_B.weight; was it saved before the weights were gathered?",
      file.string(), adapter.tensors.size());
}

Adapter read_peft(const fs::path& folder) {
  const fs::path file = folder / "adapter_config.json";
  const Json config = read_config(file);
  Adapter adapter;
  adapter.lora = lora_of_peft(config, file.string());
  adapter.base_model = text_field(config, file.string(), "base_model_name_or_path", "");
  const bool is_pickle =
      !fs::exists(folder / "adapter_model.safetensors") && fs::exists(folder / "adapter_model.bin");
  const fs::path weights = folder / (is_pickle ? "adapter_model.bin" : "adapter_model.safetensors");
  adapter.where = weights.string();
  append_tensors(adapter, weights);
  expect_matrices(adapter, weights);
  if (fs::exists(folder / "non_lora_trainables.bin"))
    append_tensors(adapter, folder / "non_lora_trainables.bin");
  return adapter;
}

Adapter read_step(const fs::path& folder) {
  const fs::path file = folder / "caldera.json";
  const Json caldera = read_config(file);
  CALDERA_CHECK(caldera.contains("build"), CheckpointError, "{}: expected a \"build\" of the model",
                file.string());
  const BuildSpec spec = build_spec_from_json(caldera["build"], file.string());
  CALDERA_CHECK(spec.lora, CheckpointError, "{}: its stage trained no adapter (recipe: stages.NAME.lora)",
                folder.string());
  Adapter adapter{.lora = *spec.lora,
                  .base_model = spec.overlays.empty() ? "" : spec.overlays.back().path,
                  .where = (folder / "model.safetensors").string(),
                  .tensors = {}};
  append_tensors(adapter, folder / "model.safetensors");
  return adapter;
}

// transformers 5 leaves "vision_model." out of a tower's names.
const NamedTensor* find_tensor(const std::map<std::string, NamedTensor>& tensors, const std::string& name) {
  const std::string tower = "vision_tower.";
  auto found = tensors.find(name);
  if (found == tensors.end() && name.starts_with(tower))
    found = tensors.find(tower + "vision_model." + name.substr(tower.size()));
  return found == tensors.end() ? nullptr : &found->second;
}

}  // namespace

bool is_adapter_folder(const fs::path& folder) { return fs::exists(folder / "adapter_config.json"); }

Adapter read_adapter(const fs::path& folder) {
  if (is_adapter_folder(folder)) return read_peft(folder);
  if (is_adapter_folder(folder / "adapter")) return read_peft(folder / "adapter");
  CALDERA_CHECK(fs::exists(folder / "caldera.json") && fs::exists(folder / "manifest.json"), CheckpointError,
                "{}: no adapter: looked for adapter_config.json, adapter/ and a step's checkpoint",
                folder.string());
  return read_step(folder);
}

Adapter adapter_of(LlavaModel& model, const BuildSpec& spec, const std::vector<std::string>& components) {
  CALDERA_ASSERT(spec.lora);
  Adapter adapter{.lora = *spec.lora,
                  .base_model = spec.overlays.empty() ? "" : spec.overlays.back().path,
                  .where = "the model's adapter",
                  .tensors = {}};
  for (const std::string& component : components)
    for (const NamedTensor& named : model.component_tensors(component))
      if (component != "language_model" || is_lora_name(named.name))
        adapter.tensors.emplace_back(named.name, named.value());
  return adapter;
}

void merge_adapter(LlavaModel& model, const Adapter& adapter) {
  const at::NoGradGuard no_grad;
  std::map<std::string, NamedTensor> weights;
  for (const NamedTensor& named : model.tensors()) weights.emplace(named.name, named);
  std::map<std::string, at::Tensor> stored(adapter.tensors.begin(), adapter.tensors.end());
  for (const auto& [name, tensor] : adapter.tensors) {
    note_headway();
    const bool is_a = name.ends_with(kA), is_b = name.ends_with(kB);
    const std::string module = name.substr(0, name.size() - (is_a || is_b ? kA.size() : 0));
    const NamedTensor* named = find_tensor(weights, is_a || is_b ? module + ".weight" : name);
    CALDERA_CHECK(named != nullptr, CheckpointError, "{}: adapter: tensor {} has no place in the model",
                  adapter.where, name);
    at::Tensor weight = named->value();
    if (!is_a && !is_b) {
      CALDERA_CHECK(tensor.sizes() == weight.sizes(), CheckpointError,
                    "{}: adapter: {}: expected shape [{}], got [{}]", adapter.where, name,
                    fmt::join(weight.sizes(), ", "), fmt::join(tensor.sizes(), ", "));
      weight.copy_(tensor);
      continue;
    }
    const auto other = stored.find(module + std::string(is_a ? kB : kA));
    CALDERA_CHECK(other != stored.end(), CheckpointError, "{}: adapter: {} without {}", adapter.where, name,
                  is_a ? "lora_B" : "lora_A");
    if (is_b) continue;  // its turn is A's
    const at::Tensor &a_RI = tensor, &b_OR = other->second;
    const int64_t r = adapter.lora.lora_r;
    CALDERA_CHECK(weight.dim() == 2 && a_RI.sizes() == at::IntArrayRef({r, weight.size(1)}) &&
                      b_OR.sizes() == at::IntArrayRef({weight.size(0), r}),
                  CheckpointError,
                  "{}: adapter: {}: lora_A [{}] and lora_B [{}] do not fit rank {} and the weight [{}]",
                  adapter.where, module, fmt::join(a_RI.sizes(), ", "), fmt::join(b_OR.sizes(), ", "), r,
                  fmt::join(weight.sizes(), ", "));
    const at::Tensor update_OI = at::mm(b_OR.to(at::kFloat), a_RI.to(at::kFloat)) * adapter.lora.scaling();
    weight.copy_(weight.to(at::kFloat) + update_OI.to(weight.device()));
  }
}

void write_peft_adapter(const Adapter& adapter, bool for_decoder, at::ScalarType dtype,
                        const fs::path& folder) {
  std::set<std::string> targets, whole;
  TensorList tensors;
  for (const auto& [name, tensor] : adapter.tensors) {
    if (is_lora_name(name)) {
      const std::string module = name.substr(0, name.size() - kA.size());
      targets.insert(module.substr(module.rfind('.') + 1));
    } else {
      if (for_decoder) continue;
      whole.insert(name.substr(0, name.find('.')));
    }
    tensors.emplace_back(peft_name(name, for_decoder), tensor);
  }
  const double alpha = adapter.lora.lora_alpha;
  const Json json_alpha = alpha == std::floor(alpha) ? Json(static_cast<int64_t>(alpha)) : Json(alpha);
  const std::vector<std::string> target_list(targets.begin(), targets.end());
  const Json target_modules =
      for_decoder ? Json(target_list)
                  : Json(fmt::format(".*language_model\\..*\\.({})", fmt::join(target_list, "|")));
  write_json(folder / "adapter_config.json",
             {{"auto_mapping", Json()},
              {"base_model_name_or_path", adapter.base_model.empty() ? Json() : Json(adapter.base_model)},
              {"bias", "none"},
              {"fan_in_fan_out", false},
              {"inference_mode", true},
              {"init_lora_weights", true},
              {"lora_alpha", json_alpha},
              {"lora_dropout", adapter.lora.lora_dropout},
              {"modules_to_save",
               whole.empty() ? Json() : Json(std::vector<std::string>(whole.begin(), whole.end()))},
              {"peft_type", "LORA"},
              {"r", adapter.lora.lora_r},
              {"revision", Json()},
              {"target_modules", target_modules},
              {"task_type", "CAUSAL_LM"},
              {"use_dora", false},
              {"use_rslora", adapter.lora.use_rslora}});
  write_safetensors(folder / "adapter_model.safetensors", tensors, {{"format", "pt"}}, dtype);
}

}  // namespace caldera
