// What can be asked of a scene: questions with one right answer.
#include "base/error.h"
#include "data/scene_words.h"

namespace caldera {
namespace {

// What a question is about: a held-out combination if there is one, else any object.
const SceneObject& pick_object(const Scene& scene, Rng& rng) {
  for (const SceneObject& object : scene.objects) {
    if (is_held_out(object.colour, object.shape)) return object;
  }
  return rng.pick(scene.objects);
}

Question ask_colour(const Scene& scene, Rng& rng) {
  const SceneObject& object = pick_object(scene, rng);
  const bool by_shape = count_shape(scene, object.shape) == 1 && rng.below(3) > 0;
  return {"colour",
          by_shape ? fmt::format("What colour is the {}?", shape_name(object.shape))
                   : fmt::format("What colour is the shape in the {}?", place_name(object.place)),
          colour_name(object.colour)};
}

Question ask_shape(const Scene& scene, Rng& rng) {
  const SceneObject& object = pick_object(scene, rng);
  const bool by_colour = count_colour(scene, object.colour) == 1 && rng.below(3) > 0;
  return {"shape",
          by_colour ? fmt::format("Which shape is {}?", colour_name(object.colour))
                    : fmt::format("What shape is in the {}?", place_name(object.place)),
          shape_name(object.shape)};
}

Question ask_position(const Scene& scene, Rng& rng) {
  const SceneObject& object = pick_object(scene, rng);
  const uint64_t form = rng.below(3);
  std::string what = name(object);
  if (form == 0 && count_shape(scene, object.shape) == 1) what = shape_name(object.shape);
  if (form == 1 && count_colour(scene, object.colour) == 1) what = colour_name(object.colour) + " shape";
  return {"position", fmt::format("Where is the {}?", what), place_name(object.place)};
}

Question ask_count(const Scene& scene, Rng& rng) {
  const uint64_t form = rng.below(3);
  if (form == 0) return {"count", "How many shapes are there?", std::to_string(scene.objects.size())};
  // The number is drawn first, among those the scene has, so that none of them is the safe guess.
  const bool by_colour = form == 1;
  const int num_kinds = static_cast<int>(by_colour ? kColours.size() : kShapes.size());
  std::vector<std::vector<int>> kinds(kPlaces.size() + 1);  // by how many there are
  for (int kind = 0; kind < num_kinds; ++kind) {
    const int64_t number = by_colour ? count_colour(scene, kind) : count_shape(scene, kind);
    kinds[static_cast<size_t>(number)].push_back(kind);
  }
  std::vector<size_t> numbers;
  for (size_t number = 0; number < kinds.size(); ++number) {
    if (!kinds[number].empty()) numbers.push_back(number);
  }
  const size_t number = rng.pick(numbers);
  const int kind = rng.pick(kinds[number]);
  return {"count",
          by_colour ? fmt::format("How many {} shapes are there?", colour_name(kind))
                    : fmt::format("How many {} are there?", plural(kind)),
          std::to_string(number)};
}

Question ask_yes_no(const Scene& scene, Rng& rng) {
  const bool yes = rng.below(2) == 0;
  const uint64_t form = rng.below(4);
  std::string what;
  if (form == 0) {
    const int shape = pick_kind(
        kShapes.size(), yes, [&](int kind) { return count_shape(scene, kind); }, rng);
    what = shape_name(shape);
  } else if (form == 1) {
    const int colour = pick_kind(
        kColours.size(), yes, [&](int kind) { return count_colour(scene, kind); }, rng);
    what = colour_name(colour) + " shape";
  } else if (yes) {
    what = name(pick_object(scene, rng));
  } else {
    const auto [colour, shape] = absent_pair(scene, rng);
    what = colour_name(colour) + " " + shape_name(shape);
  }
  return {"yes_no", fmt::format("Is there {}?", with_article(what)), yes ? "yes" : "no"};
}

}  // namespace

Question ask(const Scene& scene, const std::string& type, Rng& rng) {
  if (type == "colour") return ask_colour(scene, rng);
  if (type == "shape") return ask_shape(scene, rng);
  if (type == "count") return ask_count(scene, rng);
  if (type == "position") return ask_position(scene, rng);
  CALDERA_ASSERT(type == "yes_no");
  return ask_yes_no(scene, rng);
}

}  // namespace caldera
