// What a stage leaves on disk: checkpoints, and at its end the model.
#include "base/files.h"
#include "base/headway.h"
#include "model/weights/adapters.h"
#include "train/trainer.h"

namespace caldera {

Json Trainer::describe() const {
  const ModelCard card{.conversation_template = stage_.data.conversation_template,
                       .image_aspect_ratio = stage_.data.image_aspect_ratio,
                       .vocab_size = model_->language->vocab_size(),
                       .provenance = {{"vision_tower", recipe_.model.vision_tower},
                                      {"language_model", recipe_.model.language_model},
                                      {"stage", stage_.name},
                                      {"step", steps_done_},
                                      {"num_steps", num_steps_},
                                      {"trained", stage_.trainable},
                                      {"data", stage_.data.data_path},
                                      {"recipe", dump_recipe(recipe_)}}};
  return {{"build", to_json(build_)}, {"card", to_json(card)}, {"tokenizer", tokenizer_of(recipe_)}};
}

void Trainer::announce_saved(const std::optional<fs::path>& folder) {
  if (folder) observer_.on_checkpoint(*folder);
}

void Trainer::save_checkpoint() {
  announce_saved(checkpoints_->finish());
  world_.at(steps_done_, "saving a checkpoint");
  const bool in_parts = sharding_ && !sharding_->is_replicated();
  CheckpointShare share{.state = {.step = steps_done_,
                                  .num_updates = optimizer_->num_updates(),
                                  .seed = recipe_.seed,
                                  .num_samples = static_cast<int64_t>(data_.records->size()),
                                  .eval_loss = eval_loss_,
                                  .recipe = recipe_part(recipe_, stage_),
                                  .caldera = describe()},
                        .masters_are_copies = in_parts,
                        .part = sharding_ ? sharding_->part() : 0,
                        .num_parts = sharding_ ? sharding_->num_parts() : 1};
  if (in_parts)
    share.masters = sharding_->gather_masters(*optimizer_);
  else if (world_.is_first())
    share.masters = optimizer_->masters();
  if (share.part >= 0) share.moments = optimizer_->moments();
  checkpoints_->save(std::move(share));
  if (!stage_.async_save) announce_saved(checkpoints_->finish());
}

std::unique_ptr<LlavaModel> Trainer::keep_adapter(const fs::path& folder) {
  fs::create_directories(folder);
  const Adapter adapter = adapter_of(*model_, build_, stage_.trainable);
  write_peft_adapter(adapter, /*for_decoder=*/false, parse_dtype(stage_.dtype), folder);
  write_json(folder / "caldera.json", describe());
  if (!stage_.uses_4bit()) {
    for (Linear* linear : model_->language->linears()) {
      linear->merge();
      note_headway();
    }
    return nullptr;
  }
  BuildSpec base = build_;
  base.lora.reset();
  std::unique_ptr<LlavaModel> whole = build_llava(base);
  merge_adapter(*whole, adapter);
  return whole;
}

void Trainer::save_final() {
  world_.at(steps_done_, "writing the final model");
  if (sharding_) sharding_->hold_all();
  if (!world_.is_first()) return world_.barrier();
  const Tokenizer& tokenizer = *data_.format.tokenizer;
  write_folder_atomic(folder_ / "final", [&](const fs::path& folder) {
    const int64_t image_token_id = tokenizer.save(folder, exported_chat_template(*data_.format.conversation, tokenizer));
    const std::unique_ptr<LlavaModel> whole = build_.lora ? keep_adapter(folder / "adapter") : nullptr;
    save_hf_llava(whole ? *whole : *model_, model_card_from_json(describe().at("card"), "caldera.json"),
                  {.dtype = parse_dtype(stage_.dtype),
                   .image_token_id = image_token_id,
                   .bos_token_id = tokenizer.bos_id(),
                   .eos_token_id = tokenizer.eos_id(),
                   .pad_token_id = tokenizer.pad_id()},
                  folder);
  });
  world_.barrier();
}

}  // namespace caldera
