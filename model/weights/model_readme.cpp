#include "model/weights/model_readme.h"

#include <fmt/format.h>

#include "base/files.h"
#include "base/strings.h"

namespace caldera {
namespace {

std::string text_of(const Json& json, const char* key) {
  if (!json.is_object() || !json.contains(key) || json[key].is_null()) return "";
  const Json& value = json[key];
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return json_line(value);
  std::vector<std::string> parts;
  for (const Json& part : value)
    parts.push_back(part.is_string() ? part.get<std::string>() : json_line(part));
  return join(parts, ", ");
}

std::string millions(int64_t count) { return fmt::format("{:.1f} M", static_cast<double>(count) / 1e6); }

std::string parts_table(LlavaModel& model) {
  const Json text = model.language->config();
  const ImageSpec spec = model.image_spec();
  return fmt::format(
      "| part | what | parameters |\n|---|---|---|\n"
      "| vision tower | {}, pictures of {} x {} pixels, {} tokens each (hidden state {}, {}) | {} |\n"
      "| projector | {} | {} |\n"
      "| language model | {}, {} layers, width {}, vocabulary {}, up to {} tokens | {} |\n",
      model.vision->id(), spec.image_size, spec.image_size, spec.num_image_tokens,
      model.features.vision_feature_layer, model.features.vision_feature_select_strategy,
      millions(count_parameters(model.vision->tensors())), model.mm_projector_type,
      millions(count_parameters(model.projector->tensors())), model.language->id(),
      text.at("num_hidden_layers").get<int64_t>(), model.language->hidden_size(),
      model.language->vocab_size(), model.language->max_position_embeddings(),
      millions(count_parameters(model.language->tensors())));
}

std::string training(const Json& provenance) {
  if (!provenance.is_object() || provenance.empty()) return "Not recorded.\n";
  const std::pair<const char*, const char*> lines[] = {{"vision_tower", "Vision tower"},
                                                       {"language_model", "Language model"},
                                                       {"data", "Data"},
                                                       {"stage", "Stage"},
                                                       {"trained", "Trained in it"}};
  std::string out;
  for (const auto& [key, label] : lines)
    if (const std::string value = text_of(provenance, key); !value.empty())
      out += fmt::format("- {}: `{}`\n", label, value);
  if (const std::string step = text_of(provenance, "step"); !step.empty())
    out += fmt::format("- Steps: {} of {}\n", step, text_of(provenance, "num_steps"));
  const std::string recipe = text_of(provenance, "recipe");
  // A fence longer than any in the recipe's own text.
  if (!recipe.empty())
    out += fmt::format("\nThe whole recipe:\n\n````yaml\n{}\n````\n", strip(replace_all(recipe, "````", "")));
  return out.empty() ? "Not recorded.\n" : out;
}

}  // namespace

ModelUsage hf_usage(bool fits_transformers) {
  if (!fits_transformers)
    return {"",
            "`caldera generate --model . --image PICTURE --prompt TEXT`. transformers' "
            "LlavaForConditionalGeneration cannot hold "
            "this tower or projector.\n"};
  return {"transformers",
          "```python\n"
          "from transformers import AutoProcessor, LlavaForConditionalGeneration\n"
          "model = LlavaForConditionalGeneration.from_pretrained(\".\")\n"
          "processor = AutoProcessor.from_pretrained(\".\")\n"
          "```\n\n"
          "or `caldera generate --model . --image PICTURE --prompt TEXT`. Training cut texts at pictures "
          "before tokenising, as the "
          "original LLaVA does; where transformers' tokenizer is not a legacy one, it differs by one token "
          "after a picture.\n"};
}

ModelUsage llava_usage(const std::string& mm_vision_tower) {
  return {"", fmt::format("`python -m llava.serve.cli --model-path llava-... --image-file PICTURE` of the "
                          "original LLaVA, which wants "
                          "\"llava\" in the folder's name, and finds the vision tower as `{}` "
                          "(`mm_vision_tower` in config.json); or "
                          "`caldera generate --model .`.\n",
                          mm_vision_tower)};
}

ModelUsage gguf_usage(const std::string& model_file, const std::string& mmproj_file) {
  if (mmproj_file.empty()) return {"", fmt::format("`llama-cli -m {}` of llama.cpp.\n", model_file)};
  if (model_file.empty())
    return {"", fmt::format(
                    "`llama-mtmd-cli -m DECODER.gguf --mmproj {} --image PICTURE -p TEXT` of llama.cpp.\n",
                    mmproj_file)};
  return {"", fmt::format(
                  "`llama-mtmd-cli -m {} --mmproj {} --image PICTURE -p $'\\nTEXT'` of llama.cpp: a "
                  "line break before "
                  "the text, as in training. llama.cpp since May 2025 has a fault that gives a CLIP "
                  "tower's features in the wrong places (ggml-org/llama.cpp#25814); in a checkout that has "
                  "it, exchange the operands: `sed -i 's/ggml_concat(ctx0, inp, model.class_embedding, 1)/"
                  "ggml_concat(ctx0, model.class_embedding, inp, 1)/' tools/mtmd/models/llava.cpp`.\n",
                  model_file, mmproj_file)};
}

void write_model_readme(LlavaModel& model, const ModelCard& card, const ModelUsage& usage,
                        const fs::path& folder) {
  std::string out = "---\n";
  if (!usage.library_name.empty()) out += fmt::format("library_name: {}\n", usage.library_name);
  out += "pipeline_tag: image-text-to-text\ntags: [llava, caldera]\n---\n";
  out += fmt::format("# A LLaVA model: {} and {}\n\n", model.language->id(), model.vision->id());
  out += "Trained and written by Caldera.\n\n" + parts_table(model);
  out += fmt::format("\nConversation template: {}. Pictures that are not square: {}.\n",
                     card.conversation_template.empty() ? "not recorded" : card.conversation_template,
                     card.image_aspect_ratio == kAspectPad ? "padded" : "edges cropped");
  out += "\n## Use\n\n" + usage.text + "\n## Training\n\n" + training(card.provenance);
  write_file_atomic(folder / "README.md", out);
}

}  // namespace caldera
