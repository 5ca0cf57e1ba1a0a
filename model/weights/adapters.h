// Low-rank adapters on disk: PEFT's folders (adapter_config.json with adapter_model.safetensors) and what a
// stage that trains one leaves behind.
#pragma once
#include <filesystem>
#include <string>

#include "model/weights/load.h"

namespace caldera {

struct Adapter {
  LoraConfig lora;
  std::string base_model;  // the folder it belongs to; "" where unknown
  std::string where;       // its file or folder, for messages
  // Classic names (see LlavaModel::tensors): MODULE.lora_A.weight, MODULE.lora_B.weight, and tensors that
  // trained as a whole (the projector), which replace the base's.
  TensorList tensors;
};

// A folder with adapter_config.json: PEFT's, or one of ours.
bool is_adapter_folder(const std::filesystem::path& folder);
// Reads an adapter folder, a final/ folder that keeps one in adapter/, or a step's checkpoint of a stage that
// trains one. Names may begin at LlavaForConditionalGeneration (of transformers 4 or 5), at the decoder
// alone, or be the original LLaVA's; what torch.compile, FSDP and PEFT put into names ("_orig_mod.",
// "_fsdp_wrapped_module.", ".default") is left out. Throws CheckpointError for what is none of these, for
// kinds of adapters other than plain LoRA (naming the setting that makes it one), and for files without an
// adapter's tensors.
Adapter read_adapter(const std::filesystem::path& folder);
// The adapter that `model` carries, with the projector and the tower where `components` (a stage's trainable
// parts) name them.
Adapter adapter_of(LlavaModel& model, const BuildSpec& spec, const std::vector<std::string>& components);

// Adds B A * scaling to each weight that the adapter names, in float32, and replaces the tensors it holds
// whole. Throws CheckpointError naming a tensor that has no place in the model or does not fit.
void merge_adapter(LlavaModel& model, const Adapter& adapter);
// The base with the adapter of `folder` merged. The base is `model_base`; where that is empty, what the
// folder's caldera.json builds (this program wrote it), else the folder that the adapter names. Throws
// CheckpointError where it is not found.
LoadedModel load_with_adapter(const std::filesystem::path& folder, const std::filesystem::path& model_base);
// adapter_config.json and adapter_model.safetensors as PEFT loads them onto LlavaForConditionalGeneration
// (transformers from 4.52 on); its target_modules match the decoder alone, never the tower. With
// `for_decoder` instead onto the decoder by itself: the adapter's tensors only.
void write_peft_adapter(const Adapter& adapter, bool for_decoder, at::ScalarType dtype,
                        const std::filesystem::path& folder);

}  // namespace caldera
