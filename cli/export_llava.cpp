// --format llava: what the original LLaVA's code loads.
#include "base/error.h"
#include "cli/export.h"
#include "model/weights/llava_export.h"

namespace caldera {
namespace {

void check_llava(const ExportOptionsGiven& given) {
  check_part(given, {"projector"});
  float_dtype(given.dtype);
}

void write_llava(const ExportJob& job, const std::filesystem::path& folder) {
  LlavaModel& model = *job.loaded.model;
  check_original_llava(model);
  LlavaExportOptions options = {.dtype = float_dtype(job.given.dtype),
                                .mm_vision_tower = job.given.mm_vision_tower,
                                .model_max_length = model.language->max_position_embeddings(),
                                .bos_token_id = job.tokenizer.bos_id(),
                                .eos_token_id = job.tokenizer.eos_id(),
                                .pad_token_id = job.tokenizer.pad_id(),
                                .max_shard_bytes = job.given.max_shard_bytes,
                                .values = job.values};
  // LLaVA loads the tower by the name in config.json, whatever the weights hold: a path from its working
  // folder.
  if (options.mm_vision_tower.empty()) {
    std::filesystem::create_directories(folder / "vision_tower");
    save_hf_component(model, "vision_tower", options.dtype, folder / "vision_tower", options.max_shard_bytes,
                      job.values);
    options.mm_vision_tower =
        (std::filesystem::absolute(job.given.out) / "vision_tower").lexically_normal().string();
  }
  if (job.given.part == "projector") return save_original_projector(model, job.loaded.card, options, folder);
  job.tokenizer.save(folder, "", /*add_image_token=*/false);
  save_original_llava(model, job.loaded.card, options, folder);
}

}  // namespace

const ExportFormat kExportLlava = {"llava", "what the original LLaVA's code loads", check_llava, write_llava};

}  // namespace caldera
