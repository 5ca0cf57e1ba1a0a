// One generated scene: up to four coloured shapes, one a quadrant; how it is drawn and what can be said of
// it.
#pragma once
#include <array>
#include <cstdint>
#include <opencv2/core.hpp>
#include <string>
#include <vector>

#include "base/rng.h"

namespace caldera {

inline constexpr std::array kColours = {"red", "orange", "yellow", "green", "blue", "purple", "pink"};
inline constexpr std::array kShapes = {"circle", "square", "triangle", "star", "cross"};
inline constexpr std::array kPlaces = {"top left", "top right", "bottom left", "bottom right"};

struct SceneObject {
  int colour = 0, shape = 0, place = 0;  // indices into the lists above
  double center_x = 0, center_y = 0;     // of the picture's side, 0 to 1
  double radius = 0;                     // to the furthest point, of the picture's side
  double angle = 0;                      // radians, clockwise
  // The box around the drawn outline: x1, y1, x2, y2 of the picture's side.
  std::array<double, 4> box() const;
};

struct Scene {
  std::vector<SceneObject> objects;  // in order of place; no two of the same colour and shape
  uint64_t texture_seed = 0;         // background and shades
};

// Colour and shape that never meet in training. Every colour and every shape is seen in other company.
bool is_held_out(int colour, int shape);

// A scene without held-out combinations, or with at least one.
Scene sample_scene(Rng& rng, bool with_held_out);
// RGB, 8 bits.
cv::Mat draw_scene(const Scene& scene, int size_px);

struct Question {
  std::string type, text, answer;
};
inline constexpr std::array kQuestionTypes = {"colour", "shape", "count", "position", "yes_no"};

// A question of that type with exactly one right answer. Held-out combinations are asked for only in scenes
// that show one, and then the question is about it where it can be.
Question ask(const Scene& scene, const std::string& type, Rng& rng);

// "A red circle in the top left and a blue star in the bottom right."
std::string short_caption(const Scene& scene, Rng& rng);
// The number of shapes, remarks on kinds of them, each with its place, and the empty places, in one of
// several wordings.
std::string long_caption(const Scene& scene, Rng& rng);
// A form filled in: "Places: red circle: top left. Numbers: red: 1, star: 0. Present: blue cross: no, red:
// yes." Four of seven sections, entries in any order. Each value is to be looked up by the words right before
// it, which is how a small decoder learns to look things up in a picture at all.
std::string inventory(const Scene& scene, Rng& rng);
// The section on places alone, with all that can be placed: by name, by shape and by colour. Where a thing
// is, is what a decoder learns last.
std::string place_list(const Scene& scene, Rng& rng);

}  // namespace caldera
