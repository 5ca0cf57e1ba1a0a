#include "model/weights/inspect_parts.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "base/gguf.h"
#include "base/strings.h"
#include "model/weights/safetensors_types.h"

namespace caldera {
namespace {

std::string shape_text(const std::vector<int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::string ggml_type_name(uint32_t type) {
  static const std::map<uint32_t, const char*> kNames = {
      {0, "f32"},   {1, "f16"},   {2, "q4_0"},  {3, "q4_1"},  {6, "q5_0"},  {7, "q5_1"}, {8, "q8_0"},
      {10, "q2_k"}, {11, "q3_k"}, {12, "q4_k"}, {13, "q5_k"}, {14, "q6_k"}, {30, "bf16"}};
  const auto known = kNames.find(type);
  return known == kNames.end() ? fmt::format("ggml type {}", type) : known->second;
}

std::string type_name(at::ScalarType type) {
  for (const SafetensorsType& known : kSafetensorsTypes)
    if (known.type == type) {
      std::string name(known.name);
      for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
      return name;
    }
  return c10::toString(type);
}

// A map: nothing is copied.
TensorReport report_of(const TensorSource& source, const std::string& name) {
  return report_of_tensor(name, source.read(name));
}

std::string integers(const GgufFile& file, const std::string& key) {
  if (!file.has(key)) return "?";
  const GgufValue& value = file.metadata().at(key);
  const auto* number = std::get_if<int64_t>(&value);
  return number != nullptr ? std::to_string(*number) : "per layer";
}

}  // namespace

TensorReport report_of_tensor(const std::string& name, const at::Tensor& tensor) {
  return {name, type_name(tensor.scalar_type()), tensor.sizes().vec(), static_cast<int64_t>(tensor.nbytes())};
}

std::string describe(const VisionTower& tower, const VisionFeatures& features) {
  const Json config = tower.config();
  const ImageSpec spec = tower.image_spec();
  std::string text = fmt::format("{}: ", tower.id());
  if (config.contains("num_hidden_layers"))
    text += fmt::format("{} blocks, {} heads, ", config["num_hidden_layers"].get<int64_t>(),
                        config.value("num_attention_heads", int64_t{0}));
  return text + fmt::format("width {}, pictures of {} pixels -> {} tokens (hidden state {}, {})",
                            tower.hidden_size(), spec.image_size, spec.num_image_tokens,
                            features.vision_feature_layer, features.vision_feature_select_strategy);
}

std::string describe(const LanguageModel& language) {
  const Json config = language.config();
  const Json rope = config.value("rope_parameters", Json::object());
  return fmt::format(
      "{}: {} layers, width {}, {} heads of {} ({} for keys), MLP {}, vocabulary {}{}, {} positions, rope {}",
      language.id(), config.value("num_hidden_layers", int64_t{0}), language.hidden_size(),
      config.value("num_attention_heads", int64_t{0}), config.value("head_dim", int64_t{0}),
      config.value("num_key_value_heads", int64_t{0}), config.value("intermediate_size", int64_t{0}),
      language.vocab_size(), config.value("tie_word_embeddings", false) ? " (tied)" : "",
      language.max_position_embeddings(), rope.value("rope_type", "default"));
}

std::vector<TensorReport> tensor_reports(const TensorSource& source) {
  std::vector<std::string> names = source.names();
  std::sort(names.begin(), names.end());
  std::vector<TensorReport> reports;
  for (const std::string& name : names) reports.push_back(report_of(source, name));
  return reports;
}

void deal_tensors(const std::vector<WantedPart>& parts, const TensorSource& source,
                  const std::function<std::string(const std::string&)>& name_in_source,
                  const std::function<bool(const std::string&)>& is_harmless, ModelReport& report) {
  std::set<std::string> used;
  for (const WantedPart& part : parts) {
    PartReport& told = report.parts.emplace_back(PartReport{part.name, part.what, {}});
    for (const NamedTensor& named : part.tensors) {
      const std::string name = name_in_source(named.name);
      if (!source.has(name)) {
        report.missing.push_back(name);
        continue;
      }
      used.insert(name);
      told.tensors.push_back(report_of(source, name));
      const std::vector<int64_t> expected = named.value().sizes().vec();
      if (told.tensors.back().shape != expected)
        report.missing.push_back(fmt::format("{}: expected shape {}, got {}", name, shape_text(expected),
                                             shape_text(told.tensors.back().shape)));
    }
  }
  for (const std::string& name : source.names()) {
    const bool is_old_buffer = name.ends_with(".position_ids") || name.ends_with(".rotary_emb.inv_freq");
    if (!used.contains(name) && !is_old_buffer && !is_harmless(name)) report.leftover.push_back(name);
  }
}

ModelReport inspect_gguf(const std::filesystem::path& path) {
  const GgufFile file(path);
  ModelReport report{.path = path,
                     .kind = "GGUF file",
                     .facts = {},
                     .parts = {},
                     .missing = {},
                     .leftover = {},
                     .provenance = {}};
  const std::string architecture = file.get_or<std::string>("general.architecture", "");
  const bool is_tower = architecture == "clip";
  PartReport part{is_tower ? "vision_tower and projector" : "language_model", "", {}};
  const std::string prefix = is_tower ? "clip.vision." : architecture + ".";
  part.what = fmt::format("{}: {} blocks, width {}, {} heads, MLP {}", architecture,
                          integers(file, prefix + "block_count"), integers(file, prefix + "embedding_length"),
                          integers(file, prefix + "attention.head_count"),
                          integers(file, prefix + "feed_forward_length"));
  if (is_tower) {
    part.what += fmt::format(", pictures of {} pixels, projector {}", integers(file, prefix + "image_size"),
                             file.get_or<std::string>("clip.projector_type", "?"));
  } else {
    part.what += fmt::format(", {} positions", integers(file, prefix + "context_length"));
  }
  for (const char* key : {"general.name", "general.type", "tokenizer.ggml.model", "tokenizer.ggml.pre"})
    if (file.has(key)) report.facts.emplace_back(key, file.get<std::string>(key));
  if (file.has("tokenizer.ggml.tokens"))
    report.facts.emplace_back(
        "tokens", std::to_string(file.get<std::vector<std::string>>("tokenizer.ggml.tokens").size()));
  if (!is_tower)
    report.facts.emplace_back("chat template", file.has("tokenizer.chat_template") ? "yes" : "none");
  for (const GgufTensor& tensor : file.tensors())
    part.tensors.push_back(
        {tensor.name, ggml_type_name(tensor.type), tensor.shape, static_cast<int64_t>(tensor.bytes.size())});
  report.parts.push_back(std::move(part));
  if (file.has("caldera.card")) {
    const Json card = parse_json(file.get<std::string>("caldera.card"), path.string() + ": caldera.card");
    if (card.is_object() && card.contains("provenance")) report.provenance = Json(card["provenance"]);
  }
  return report;
}

}  // namespace caldera
