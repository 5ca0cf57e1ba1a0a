// caldera export --model DIR --format hf|llava|peft|gguf --out DIR [--dtype f32|f16|bf16|q8_0|q6_k|q5_k_m|q4_k_m] [--part PART]
#include "cli/export.h"

#include <memory>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/strings.h"
#include "cli/command.h"
#include "data/template.h"
#include "eval/model_session.h"
#include "model/weights/gguf_export.h"
#include "model/weights/mapped_model.h"

namespace caldera {
namespace {

constexpr const char* kExportFile = "export.json";
constexpr const char* kWrittenBy = "caldera export";

constexpr const ExportFormat* kFormats[] = {
    &kExportHf,
    &kExportLlava,
    &kExportPeft,
    &kExportGguf,
};

const ExportFormat& find_format(const std::string& name) {
  std::vector<std::string> known;
  for (const ExportFormat* format : kFormats) {
    if (name == format->name) return *format;
    known.emplace_back(format->name);
  }
  throw ConfigError(fmt::format("--format {}: not a format{}", name, suggestion(name, known)));
}

std::string formats_help() {
  std::vector<std::string> lines;
  for (const ExportFormat* format : kFormats)
    lines.push_back(fmt::format("{}: {}", format->name, format->help));
  return join(lines, "; ");
}

std::string chat_template_of(const ModelCard& card, const Tokenizer& tokenizer) {
  if (card.conversation_template.empty()) return tokenizer.chat_template();
  return exported_chat_template(find_template(card.conversation_template), tokenizer);
}

void export_model(const ExportOptionsGiven& given) {
  const ExportFormat& format = find_format(given.format);
  CALDERA_CHECK(!given.merge || &format == &kExportPeft, ConfigError,
                "--merge belongs to --format peft; {} is merged anyway", given.format);
  if (&format == &kExportPeft && !given.merge) return export_adapter(given);
  format.check(given);
  if (!given.conversation_template.empty()) find_template(given.conversation_template);
  check_export_folder(given.out);

  // Where the weights lie in files as they are, they stay there until each is written.
  std::optional<MappedModel> mapped;
  if (given.model_base.empty()) mapped = map_llava(given.model);
  LoadedModel loaded = mapped ? std::move(mapped->loaded) : load_llava(given.model, given.model_base);
  if (!given.conversation_template.empty()) loaded.card.conversation_template = given.conversation_template;
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(tokenizer_path(loaded.folder));
  const ExportJob job = {given, loaded, mapped ? mapped->values : TensorValues(), *tokenizer,
                         chat_template_of(loaded.card, *tokenizer)};
  write_export(given, [&](const fs::path& folder) { format.write(job, folder); });
}

}  // namespace

// Other programs' model folders have a config.json as well: only what the folder says of itself tells.
void check_export_folder(const std::string& out) {
  const fs::path file = fs::path(out) / kExportFile;
  bool is_ours = false;
  if (fs::is_regular_file(file)) {
    const Json json = json_or_null(read_file(file));
    is_ours = json.is_object() && json.contains("written_by") && json["written_by"] == kWrittenBy;
  }
  check_out_folder(out, is_ours);
}

void write_export(const ExportOptionsGiven& given, const std::function<void(const fs::path&)>& fill) {
  write_folder_atomic(given.out, [&](const fs::path& folder) {
    fill(folder);
    write_json(
        folder / kExportFile,
        {{"written_by", kWrittenBy}, {"format", given.format}, {"dtype", given.dtype}, {"part", given.part}});
  });
}

at::ScalarType float_dtype(const std::string& name) {
  if (name == "f32" || name == "float32") return at::kFloat;
  if (name == "f16" || name == "float16") return at::kHalf;
  if (name == "bf16" || name == "bfloat16") return at::kBFloat16;
  throw ConfigError(fmt::format("--dtype {}: expected f32, f16 or bf16 (with --format gguf also q8_0, q6_k, q5_k_m, q4_k_m){}", name,
                                quantized_ggml_type(name) ? fmt::format("; {} is a type of --format gguf", name) : ""));
}

void check_part(const ExportOptionsGiven& given, const std::vector<std::string>& parts) {
  const bool known = given.part.empty() || std::find(parts.begin(), parts.end(), given.part) != parts.end();
  CALDERA_CHECK(known, ConfigError, "--part {}: --format {} writes a whole model, or {}", given.part,
                given.format, join(parts, " or "));
}

void setup_export(CLI::App& command) {
  auto options = std::make_shared<ExportOptionsGiven>();
  command.add_option("--model", options->model, "a run's folder, a checkpoint, or an exported folder")
      ->required();
  command.add_option("--format", options->format, formats_help())->capture_default_str();
  command.add_option("--out", options->out, "folder to write")->required();
  command.add_option("--dtype", options->dtype, "of the weights: f32, f16 or bf16; gguf: q8_0, q6_k, q5_k_m and q4_k_m as well")
      ->capture_default_str();
  command.add_option("--part", options->part,
                     "hf, gguf: vision_tower or language_model, that part alone, as a model of its own; "
                     "llava: projector, as "
                     "stage 1 leaves it (mm_projector.bin)");
  command.add_option("--template", options->conversation_template,
                     "conversation template to record (default: the model's own)");
  command.add_option("--max-shard-size", options->max_shard_bytes, "bytes of a weights file (or 5GB, 500MB)")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/true))
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command.add_option(
      "--mm-vision-tower", options->mm_vision_tower,
      "llava: the tower's name in config.json (default: the tower's folder beside the weights)");
  command.add_option("--model-base", options->model_base,
                     "the model that an adapter belongs to (default: the one it names)");
  command.add_flag("--merge", options->merge, "peft: merge the adapter into the model's weights");
  command.callback([options] { export_model(*options); });
}

}  // namespace caldera
