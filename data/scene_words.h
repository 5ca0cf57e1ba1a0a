// Names and counts of a scene's shapes, shared by what is asked and what is told of scenes.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/rng.h"
#include "data/scene.h"

namespace caldera {

inline std::string colour_name(int colour) { return kColours[static_cast<size_t>(colour)]; }
inline std::string shape_name(int shape) { return kShapes[static_cast<size_t>(shape)]; }
inline std::string place_name(int place) { return kPlaces[static_cast<size_t>(place)]; }
std::string name(const SceneObject& object);         // "red circle"
std::string plural(int shape);                       // "crosses"
std::string with_article(const std::string& words);  // "an orange circle"
std::string capitalized(std::string words);
std::string listing(const std::vector<std::string>& parts);  // "a", "a and b", "a, b and c"

int64_t count(const Scene& scene, const std::function<bool(const SceneObject&)>& is_meant);
int64_t count_colour(const Scene& scene, int colour);
int64_t count_shape(const Scene& scene, int shape);
bool shows(const Scene& scene, int colour, int shape);
bool shows_held_out(const Scene& scene);

// A combination of colour and shape that is not there: mostly one whose colour and shape both are.
std::pair<int, int> absent_pair(const Scene& scene, Rng& rng);
// An index that occurs, or one that does not; every scene has both (at most 4 objects, 5 shapes, 7 colours).
int pick_kind(int num_kinds, bool occurs, const std::function<int64_t(int)>& number, Rng& rng);

}  // namespace caldera
