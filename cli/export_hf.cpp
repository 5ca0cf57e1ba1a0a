// --format hf: what transformers, vLLM and this program load.
#include "base/error.h"
#include "cli/export.h"

namespace caldera {
namespace {

void check_hf(const ExportOptionsGiven& given) {
  check_part(given, {"vision_tower", "language_model"});
  float_dtype(given.dtype);
}

void write_hf(const ExportJob& job, const std::filesystem::path& folder) {
  const at::ScalarType dtype = float_dtype(job.given.dtype);
  LlavaModel& model = *job.loaded.model;
  if (job.given.part == "vision_tower")
    return save_hf_component(model, job.given.part, dtype, folder, job.given.max_shard_bytes, job.values);
  // A decoder by itself has no row for <image>.
  const bool is_whole = job.given.part.empty();
  const int64_t image_token_id = job.tokenizer.save(folder, job.chat_template, /*add_image_token=*/is_whole);
  if (!is_whole)
    return save_hf_component(model, job.given.part, dtype, folder, job.given.max_shard_bytes, job.values);
  save_hf_llava(model, job.loaded.card,
                {.dtype = dtype,
                 .image_token_id = image_token_id,
                 .bos_token_id = job.tokenizer.bos_id(),
                 .eos_token_id = job.tokenizer.eos_id(),
                 .pad_token_id = job.tokenizer.pad_id(),
                 .max_shard_bytes = job.given.max_shard_bytes,
                 .values = job.values},
                folder);
}

}  // namespace

const ExportFormat kExportHf = {"hf", "what transformers loads", check_hf, write_hf};

}  // namespace caldera
