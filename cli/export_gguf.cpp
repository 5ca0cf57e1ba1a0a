// --format gguf: what llama.cpp loads.
#include "base/error.h"
#include "cli/export.h"
#include "data/template.h"
#include "model/weights/gguf_export.h"
#include "model/weights/model_readme.h"

namespace caldera {
namespace {

GgmlType type_of(const std::string& dtype) {
  if (const auto type = quantized_ggml_type(dtype)) return *type;
  switch (float_dtype(dtype)) {
    case at::kHalf:
      return GgmlType::kF16;
    case at::kBFloat16:
      return GgmlType::kBF16;
    default:
      return GgmlType::kF32;
  }
}

void check_gguf(const ExportOptionsGiven& given) {
  check_part(given, {"vision_tower", "language_model"});
  type_of(given.dtype);
}

GgufFields tokenizer_fields(const ExportJob& job) {
  GgufFields fields = job.tokenizer.gguf_fields(job.loaded.model->language->vocab_size());
  if (!job.chat_template.empty()) fields.emplace_back("tokenizer.chat_template", job.chat_template);
  // What ends an answer, where that is not the end of a text (ChatML's <|im_end|>).
  const std::string& name = job.loaded.card.conversation_template;
  const std::vector<int64_t> stops =
      name.empty() ? std::vector<int64_t>() : stop_ids(find_template(name), job.tokenizer);
  if (!stops.empty() && stops.front() != job.tokenizer.eos_id())
    fields.emplace_back("tokenizer.ggml.eot_token_id", static_cast<uint32_t>(stops.front()));
  return fields;
}

void write_gguf(const ExportJob& job, const std::filesystem::path& folder) {
  LlavaModel& model = *job.loaded.model;
  const bool with_decoder = job.given.part != "vision_tower", with_tower = job.given.part != "language_model";
  if (with_tower) check_gguf_mmproj(model);
  if (with_decoder) check_gguf_decoder(*model.language);
  GgufExportOptions options = {
      .type = type_of(job.given.dtype),
      .general = {{"general.name", std::filesystem::path(job.given.out).filename().string()},
                  {"caldera.card", json_line(to_json(job.loaded.card))}},
      .tokenizer = {},
      .image_aspect_ratio = job.loaded.card.image_aspect_ratio,
      .values = job.values};
  std::string decoder_file, tower_file;
  if (with_decoder) {
    decoder_file = fmt::format("model-{}.gguf", job.given.dtype);
    options.tokenizer = tokenizer_fields(job);
    save_gguf_decoder(*model.language, options, folder / decoder_file);
  }
  if (with_tower) {
    const bool has_same_type = mmproj_ggml_type(options.type) == options.type;
    tower_file = fmt::format("mmproj-{}.gguf", has_same_type ? job.given.dtype : "f16");
    save_gguf_mmproj(model, options, folder / tower_file);
  }
  write_model_readme(model, job.loaded.card, gguf_usage(decoder_file, tower_file), folder);
}

}  // namespace

const ExportFormat kExportGguf = {"gguf", "what llama.cpp loads, decoder and mmproj", check_gguf, write_gguf};

}  // namespace caldera
