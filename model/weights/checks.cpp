#include "model/weights/checks.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <set>

#include "base/error.h"
#include "base/log.h"
#include "base/strings.h"
#include "model/vision/vit.h"
#include "model/weights/json_fields.h"
#include "model/weights/names.h"

namespace caldera {
namespace {

// "bitsandbytes (4 bits)", "gptq", ...
std::string quantization_method(const Json& quantization) {
  const auto is_true = [&quantization](const char* key) {
    return quantization.contains(key) && quantization[key] == true;
  };
  std::string method = "an unnamed method";
  if (quantization.contains("quant_method") && quantization["quant_method"].is_string())
    method = quantization["quant_method"].get<std::string>();
  if (is_true("load_in_4bit") || is_true("load_in_8bit"))
    return fmt::format("bitsandbytes ({} bits)", is_true("load_in_4bit") ? 4 : 8);
  if (quantization.contains("bits") && quantization["bits"].is_number_integer())
    return fmt::format("{} ({} bits)", method, quantization["bits"].get<int64_t>());
  return method;
}

// How many values have all bits of their exponent set (infinities and NaN), and the first of them.
template <class Bits>
std::pair<int64_t, int64_t> count_not_finite(const at::Tensor& values, Bits exponent) {
  const auto* bits = static_cast<const Bits*>(values.const_data_ptr());
  std::atomic<int64_t> count = 0, first = values.numel();
  at::parallel_for(0, values.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
    int64_t found = 0;
    for (int64_t i = begin; i < end; ++i) found += (bits[i] & exponent) == exponent;
    if (found == 0) return;
    count += found;
    int64_t i = begin;
    while ((bits[i] & exponent) != exponent) ++i;
    int64_t before = first;
    while (i < before && !first.compare_exchange_weak(before, i)) {
    }
  });
  return {count, first};
}

// The group of a tower's tensor that a file may lack as a whole; "" for tensors that are always needed.
std::string optional_group(const std::string& name, int64_t num_blocks_run) {
  constexpr std::string_view kBlock = "vision_model.encoder.layers.";
  for (const char* part : {"vision_model.post_layernorm.", "vision_model.head."})
    if (name.find(part) != std::string::npos) return part;
  const size_t at = name.find(kBlock);
  if (at == std::string::npos) return "";
  const std::string index =
      name.substr(at + kBlock.size(), name.find('.', at + kBlock.size()) - at - kBlock.size());
  return std::stoll(index) < num_blocks_run ? "" : std::string(kBlock) + index;
}

}  // namespace

void refuse_quantized(const Json& config, const std::string& where) {
  for (const char* part : {"", "text_config", "vision_config"}) {
    const std::string inner(part);
    if (!inner.empty() && !(config.contains(inner) && config[inner].is_object())) continue;
    const Json& object = inner.empty() ? config : config[inner];
    for (const char* key : {"quantization_config", "compression_config"}) {
      if (!object.contains(key) || !object[key].is_object()) continue;
      throw CheckpointError(fmt::format(
          "{}: {}: the weights are quantised by {}, which is not read; name the folder that they were made "
          "from, or one "
          "with the weights dequantised (transformers: model.dequantize(), then save_pretrained)",
          where, inner.empty() ? std::string(key) : inner + "." + key, quantization_method(object[key])));
    }
  }
}

void check_finite(const at::Tensor& values, const std::string& where, const std::string& name) {
  const at::Tensor plain = values.contiguous();
  std::pair<int64_t, int64_t> found = {0, 0};
  if (plain.scalar_type() == at::kFloat) found = count_not_finite<uint32_t>(plain, 0x7F800000);
  if (plain.scalar_type() == at::kHalf) found = count_not_finite<uint16_t>(plain, 0x7C00);
  if (plain.scalar_type() == at::kBFloat16) found = count_not_finite<uint16_t>(plain, 0x7F80);
  if (found.first == 0) return;
  std::vector<int64_t> place(static_cast<size_t>(plain.dim()));
  int64_t rest = found.second;
  for (size_t i = place.size(); i-- > 0; rest /= plain.size(static_cast<int64_t>(i)))
    place[i] = rest % plain.size(static_cast<int64_t>(i));
  throw CheckpointError(
      fmt::format("{}: {}: {} of {} values are not finite, the first ({}) at [{}]: the training that wrote "
                  "it had diverged, or the file is "
                  "damaged; take an earlier checkpoint, or get it again",
                  where, name, found.first, plain.numel(), plain.flatten()[found.second].item<float>(),
                  fmt::join(place, ", ")));
}

void untie_differing_head(Json& text, const TensorSource& source) {
  if (!text.contains("tie_word_embeddings") || text["tie_word_embeddings"] != true) return;
  const std::string head = find_llava_name("language_model.lm_head.weight", source),
                    embedding = find_llava_name("language_model.model.embed_tokens.weight", source);
  if (!source.has(head) || !source.has(embedding)) return;
  if (source.shape(head) == source.shape(embedding)) {
    const at::Tensor a = source.read(head), b = source.read(embedding);
    if (a.scalar_type() == b.scalar_type() ? at::equal(a, b) : at::equal(a.to(at::kFloat), b.to(at::kFloat)))
      return;
  }
  log_info(
      "{}: config.json says tie_word_embeddings, but {} differs from {}; both are kept, as transformers does",
      source.where(head), head, embedding);
  text["tie_word_embeddings"] = false;
}

void keep_end_tokens(Json& text, const std::filesystem::path& folder) {
  const fs::path file = folder / "generation_config.json";
  if (!fs::exists(file)) return;
  const Json generation = read_config(file);
  const Json ids = generation.value("eos_token_id", Json());
  if (!ids.is_array()) return;
  for (const Json& id : ids)
    CALDERA_CHECK(id.is_number_unsigned() && id.get<uint64_t>() < (uint64_t{1} << 31), CheckpointError,
                  "{}: eos_token_id: expected ids of tokens, got {}", file.string(), json_line(ids));
  if (!ids.empty()) text["eos_token_id"] = ids;
}

NamedTensors needed_of_tower(const NamedTensors& tensors, const VisionTower& tower,
                             const VisionFeatures& features, const TensorSource& source,
                             const std::function<std::string(const std::string&)>& name_in_source,
                             bool fill) {
  const Json config = tower.config();
  if (!config.contains("num_hidden_layers")) return tensors;
  const int64_t num_run = num_blocks_before(features.vision_feature_layer, config["num_hidden_layers"]);
  std::set<std::string> optional, held;
  for (const NamedTensor& named : tensors) {
    const std::string group = optional_group(named.name, num_run);
    if (!group.empty()) (source.has(name_in_source(named.name)) ? held : optional).insert(group);
  }
  for (const std::string& group : held) optional.erase(group);  // there in part: what is missing is a fault
  if (optional.empty()) return tensors;
  log_info("{}: lacks {}: the features of hidden state {} do not need them", source.where(""),
           join({optional.begin(), optional.end()}, ", "), features.vision_feature_layer);
  const at::NoGradGuard no_grad;
  NamedTensors needed;
  for (const NamedTensor& named : tensors) {
    if (!optional.contains(optional_group(named.name, num_run))) {
      needed.push_back(named);
    } else if (fill) {
      const bool is_scale = named.name.find("norm") != std::string::npos && named.name.ends_with("weight");
      named.value().fill_(is_scale ? 1.0 : 0.0);
    }
  }
  return needed;
}

}  // namespace caldera
