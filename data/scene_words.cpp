#include "data/scene_words.h"

#include <fmt/ranges.h>

#include <algorithm>

namespace caldera {

std::string name(const SceneObject& object) {
  return colour_name(object.colour) + " " + shape_name(object.shape);
}
std::string plural(int shape) { return shape_name(shape) + (shape_name(shape).ends_with("s") ? "es" : "s"); }
std::string with_article(const std::string& words) {
  return (words.starts_with("o") ? "an " : "a ") + words;  // of the names, only "orange" begins with a vowel
}
std::string capitalized(std::string words) {
  if (words[0] >= 'a' && words[0] <= 'z') words[0] = static_cast<char>(words[0] - 'a' + 'A');
  return words;
}

std::string listing(const std::vector<std::string>& parts) {
  if (parts.size() == 1) return parts[0];
  return fmt::format("{} and {}", fmt::join(parts.begin(), parts.end() - 1, ", "), parts.back());
}

int64_t count(const Scene& scene, const std::function<bool(const SceneObject&)>& is_meant) {
  return std::count_if(scene.objects.begin(), scene.objects.end(), is_meant);
}
int64_t count_colour(const Scene& scene, int colour) {
  return count(scene, [&](const SceneObject& object) { return object.colour == colour; });
}
int64_t count_shape(const Scene& scene, int shape) {
  return count(scene, [&](const SceneObject& object) { return object.shape == shape; });
}
bool shows(const Scene& scene, int colour, int shape) {
  return count(scene, [&](const SceneObject& object) {
           return object.colour == colour && object.shape == shape;
         }) > 0;
}
bool shows_held_out(const Scene& scene) {
  return count(scene, [](const SceneObject& object) { return is_held_out(object.colour, object.shape); }) > 0;
}

std::pair<int, int> absent_pair(const Scene& scene, Rng& rng) {
  const bool may_be_held_out = shows_held_out(scene);
  const bool wants_hard = rng.below(3) > 0;
  std::vector<std::pair<int, int>> hard, any;
  for (int colour = 0; colour < static_cast<int>(kColours.size()); ++colour) {
    for (int shape = 0; shape < static_cast<int>(kShapes.size()); ++shape) {
      if (shows(scene, colour, shape) || (is_held_out(colour, shape) && !may_be_held_out)) continue;
      any.emplace_back(colour, shape);
      if (count_colour(scene, colour) > 0 && count_shape(scene, shape) > 0) hard.emplace_back(colour, shape);
    }
  }
  return rng.pick(wants_hard && !hard.empty() ? hard : any);
}

int pick_kind(int num_kinds, bool occurs, const std::function<int64_t(int)>& number, Rng& rng) {
  std::vector<int> kinds;
  for (int kind = 0; kind < num_kinds; ++kind) {
    if ((number(kind) > 0) == occurs) kinds.push_back(kind);
  }
  return rng.pick(kinds);
}

}  // namespace caldera
