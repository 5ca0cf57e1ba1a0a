// The few words that model/ and data/ share, so that neither needs to see the other.
#pragma once
#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace caldera {

// Stands in input_ids where an image's features go (LLaVA's constants.py). One per image before expansion,
// one per image token after it.
inline constexpr int64_t kImageTokenIndex = -200;
// Label of a position at which nothing is learned.
inline constexpr int64_t kIgnoreIndex = -100;
// The placeholder as it stands in a conversation's text.
inline constexpr const char* kImagePlaceholder = "<image>";

// What a vision tower wants to be given, as CLIPImageProcessor describes it. The loader resizes to uint8 pixels;
// the tower scales them to [0, 1] and normalises.
struct ImageSpec {
  int64_t image_size = 336;  // pixels, square
  std::array<float, 3> image_mean = {0.48145466f, 0.4578275f, 0.40821073f};  // RGB, of values in [0, 1]
  std::array<float, 3> image_std = {0.26862954f, 0.26130258f, 0.27577711f};
  int64_t num_image_tokens = 576;  // rows of features that one image takes in the packed row
  // true (CLIP): the shorter edge is resized to image_size and the centre kept; false (SigLIP): both edges are
  // resized to it.
  bool keeps_aspect = true;
};

// How a picture that is not square becomes one. "square" (LLaVA's name): resize the shorter edge, crop the centre.
// "pad": centre it on a square of the mean colour first.
inline constexpr const char* kAspectSquare = "square";
inline constexpr const char* kAspectPad = "pad";

}  // namespace caldera
