// The activations of every layer for a few samples: what `caldera score --taps` writes.
#pragma once
#include "base/batch.h"
#include "model/llava.h"
#include "model/weights/safetensors.h"

namespace caldera {

// Runs the model on the batch and returns what it computed under the names of model/taps.h, in float32 on the
// CPU, and the batch itself: "input_ids" [T] (-200 at image tokens), "position_ids" [T], "cu_seqlens" [S +
// 1], "pixels" [I, 3, Y, X] uint8 where there are pictures.
TensorList record_taps(LlavaModel& model, const PackedBatch& batch);

}  // namespace caldera
