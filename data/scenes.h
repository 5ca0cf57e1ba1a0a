// Built-in generated data: pictures of coloured shapes with captions, boxes and questions. Needs no download.
#pragma once
#include <cstdint>
#include <filesystem>

namespace caldera {

struct ScenesOptions {
  int64_t num_train = 8000;  // pictures
  int64_t num_test = 500;    // pictures; half of them show a held-out combination
  int64_t image_size_px = 64;
  uint64_t seed = 0;
};

// Writes into the folder (atomically) images/*.png, the image folder of every file here, and
// - pretrain.json: a short caption a picture;
// - finetune.json: 8 to 12 questions a picture, in one conversation;
// - base_captions.json: short captions and inventories, from which the small base models learn to see and
// speak;
// - base_places.json: the same on places alone, of pictures with two or more shapes;
// - test.json: one question a record, two a picture, "type" in {colour, shape, count, position, yes_no}
// evenly,
//   "held_out": true where the picture shows a combination of colour and shape that never met in training;
// - captions_test.json: short captions of the same pictures;
// - boxes.json: LLaVA's caps_boxes form, with "split": train or test.
// A picture and its texts depend on the seed and its number alone. Replaces scenes that are there; throws
// ConfigError for a folder that holds something else.
void make_scenes(const std::filesystem::path& folder, const ScenesOptions& options);

}  // namespace caldera
