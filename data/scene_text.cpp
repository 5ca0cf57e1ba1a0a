// What can be said of a scene: captions in several wordings, questions with one right answer.
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <optional>

#include "base/error.h"
#include "data/scene.h"

namespace caldera {
namespace {

std::string colour_name(int colour) { return kColours[static_cast<size_t>(colour)]; }
std::string shape_name(int shape) { return kShapes[static_cast<size_t>(shape)]; }
std::string place_name(int place) { return kPlaces[static_cast<size_t>(place)]; }
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

// "a", "a and b", "a, b and c"
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

// A combination that is not there: mostly one whose colour and shape both are.
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

// An index that occurs, or one that does not; every scene has both (at most 4 objects, 5 shapes, 7 colours).
int pick_kind(int num_kinds, bool occurs, const std::function<int64_t(int)>& number, Rng& rng) {
  std::vector<int> kinds;
  for (int kind = 0; kind < num_kinds; ++kind) {
    if ((number(kind) > 0) == occurs) kinds.push_back(kind);
  }
  return rng.pick(kinds);
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

std::string short_caption(const Scene& scene, Rng& rng) {
  const bool place_first = rng.below(3) == 0;
  std::vector<std::string> parts;
  for (const SceneObject& object : scene.objects) {
    const std::string what = with_article(name(object)), where = "in the " + place_name(object.place);
    parts.push_back(place_first ? where + " " + what : what + " " + where);
  }
  return capitalized(listing(parts)) + ".";
}

std::string long_caption(const Scene& scene, Rng& rng) {
  static const std::vector<std::string> numbers = {"no shapes", "one shape", "two shapes", "three shapes",
                                                   "four shapes"};
  const std::string number = numbers[scene.objects.size()];
  std::string caption;
  switch (rng.below(4)) {
    case 0:
      caption = fmt::format("The picture shows {}.", number);
      break;
    case 1:
      caption = fmt::format("There {} {} in the picture.", scene.objects.size() == 1 ? "is" : "are", number);
      break;
    case 2:
      caption = fmt::format("This is a picture of {}.", number);
      break;
    default:
      caption = fmt::format("{} can be seen.", capitalized(number));
      break;
  }
  const uint64_t wording = rng.below(4);
  for (const SceneObject& object : scene.objects) {
    const std::string what = with_article(name(object)), place = place_name(object.place);
    switch (wording) {
      case 0:
        caption += fmt::format(" There is {} in the {}.", what, place);
        break;
      case 1:
        caption += fmt::format(" In the {} there is {}.", place, what);
        break;
      case 2:
        caption += fmt::format(" The shape in the {} is {}.", place, what);
        break;
      default:
        caption += fmt::format(" {} is in the {}.", capitalized(what), place);
        break;
    }
  }
  std::vector<std::string> empty;
  for (int place = 0; place < static_cast<int>(kPlaces.size()); ++place) {
    if (count(scene, [&](const SceneObject& object) { return object.place == place; }) == 0) {
      empty.push_back("the " + place_name(place));
    }
  }
  if (!empty.empty() && rng.below(2) == 0) {
    caption += fmt::format(" {} {} empty.", capitalized(listing(empty)), empty.size() == 1 ? "is" : "are");
  }
  return caption;
}

}  // namespace caldera
