// caldera export --model DIR --format hf --out DIR [--dtype bf16|f16|f32] [--part
// vision_tower|language_model]
#include <memory>

#include "base/error.h"
#include "base/files.h"
#include "cli/command.h"
#include "data/template.h"

namespace caldera {
namespace {

struct ExportCommand {
  std::string model, format = "hf", out, dtype = "f32", part, conversation_template;
};

at::ScalarType dtype_of(const std::string& name) {
  if (name == "f32" || name == "float32") return at::kFloat;
  if (name == "f16" || name == "float16") return at::kHalf;
  if (name == "bf16" || name == "bfloat16") return at::kBFloat16;
  throw ConfigError(fmt::format("--dtype {}: expected f32, f16 or bf16", name));
}

// The template's own Jinja form, else what the tokenizer came with.
std::string chat_template_of(const ModelCard& card, const Tokenizer& tokenizer) {
  if (card.conversation_template.empty()) return tokenizer.chat_template();
  const std::string jinja = find_template(card.conversation_template).jinja;
  return jinja.empty() ? tokenizer.chat_template() : jinja;
}

void export_model(const ExportCommand& command) {
  CALDERA_CHECK(command.format == "hf", ConfigError, "--format {}: the formats are: hf", command.format);
  CALDERA_CHECK(command.part.empty() || command.part == "vision_tower" || command.part == "language_model",
                ConfigError, "--part {}: expected vision_tower or language_model", command.part);
  const at::ScalarType dtype = dtype_of(command.dtype);
  if (!command.conversation_template.empty()) find_template(command.conversation_template);
  check_out_folder(command.out, "config.json");

  LoadedModel loaded = load_llava(command.model);
  if (!command.conversation_template.empty())
    loaded.card.conversation_template = command.conversation_template;
  write_folder_atomic(command.out, [&](const fs::path& folder) {
    if (command.part == "vision_tower") return save_hf_component(*loaded.model, command.part, dtype, folder);
    const auto tokenizer = load_tokenizer(tokenizer_path(loaded.folder));
    const int64_t image_token_id = tokenizer->save(folder, chat_template_of(loaded.card, *tokenizer));
    if (command.part == "language_model")
      return save_hf_component(*loaded.model, command.part, dtype, folder);
    save_hf_llava(*loaded.model, loaded.card,
                  {.dtype = dtype,
                   .image_token_id = image_token_id,
                   .bos_token_id = tokenizer->bos_id(),
                   .eos_token_id = tokenizer->eos_id(),
                   .pad_token_id = tokenizer->pad_id()},
                  folder);
  });
}

}  // namespace

void setup_export(CLI::App& command) {
  auto options = std::make_shared<ExportCommand>();
  command.add_option("--model", options->model, "a run's folder, a checkpoint, or an exported folder")
      ->required();
  command.add_option("--format", options->format, "hf: what transformers loads")->capture_default_str();
  command.add_option("--out", options->out, "folder to write")->required();
  command.add_option("--dtype", options->dtype, "of the weights: f32, f16 or bf16")->capture_default_str();
  command.add_option("--part", options->part,
                     "vision_tower or language_model: that part alone, as a model of its own");
  command.add_option("--template", options->conversation_template,
                     "conversation template to record (default: the model's own)");
  command.callback([options] { export_model(*options); });
}

}  // namespace caldera
