#include "base/batch.h"

#include "base/aten.h"


namespace caldera {

PackedBatch PackedBatch::to(at::Device device) const {
  PackedBatch moved = *this;
  for (at::Tensor* tensor : {&moved.input_ids_T, &moved.position_ids_T, &moved.supervised_K, &moved.targets_K,
                             &moved.image_rows_IP, &moved.pixels_ICYX}) {
    if (tensor->defined()) *tensor = tensor->to(device, /*non_blocking=*/true);
  }
  return moved;
}

}  // namespace caldera
