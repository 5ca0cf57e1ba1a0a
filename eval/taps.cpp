#include "eval/taps.h"

#include "model/taps.h"

namespace caldera {

TensorList record_taps(LlavaModel& model, const PackedBatch& batch) {
  const at::NoGradGuard no_grad;
  TensorList taps = {{"input_ids", batch.input_ids_T},
                     {"position_ids", batch.position_ids_T},
                     {"cu_seqlens", at::tensor(batch.cu_seqlens, at::kLong)}};
  if (batch.num_images() > 0) taps.emplace_back("pixels", batch.pixels_ICYX);
  const TapRecorder recorder([&taps](const std::string& name, const at::Tensor& value) {
    taps.emplace_back(name, value.to(at::kCPU, at::kFloat).contiguous().clone());
  });
  model.logits(batch.to(model.device()));
  return taps;
}

}  // namespace caldera
