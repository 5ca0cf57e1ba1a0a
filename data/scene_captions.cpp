// What can be told of a scene: captions in several wordings, and inventories.
#include <fmt/ranges.h>

#include <algorithm>
#include <array>

#include "data/scene_words.h"

namespace caldera {
namespace {

// A caption that goes through the places in a fixed order can be written without ever asking where a thing
// is; in any order, the next word must be looked up by what was said before.
std::vector<SceneObject> in_any_order(const Scene& scene, Rng& rng) {
  std::vector<SceneObject> objects = scene.objects;
  rng.shuffle(objects);
  return objects;
}

// How many there are of one kind, none included.
std::string remark(const Scene& scene, Rng& rng) {
  static const std::vector<std::string> numbers = {"no", "one", "two", "three", "four"};
  const bool by_colour = rng.below(2) == 0, occurs = rng.below(3) > 0;
  const auto count_kind = [&](int kind) {
    return by_colour ? count_colour(scene, kind) : count_shape(scene, kind);
  };
  const int kind =
      pick_kind(static_cast<int>(by_colour ? kColours.size() : kShapes.size()), occurs, count_kind, rng);
  const int64_t number = count_kind(kind);
  const std::string noun = by_colour     ? colour_name(kind) + (number == 1 ? " shape" : " shapes")
                           : number == 1 ? shape_name(kind)
                                         : plural(kind);
  return fmt::format("There {} {} {}.", number == 1 ? "is" : "are", numbers[static_cast<size_t>(number)],
                     noun);
}

struct Fact {
  std::string of, is;
};

// "Places: red circle: top left, blue star: bottom right."
std::string section(const std::string& heading, std::vector<Fact> facts, Rng& rng) {
  if (facts.empty()) return "";
  rng.shuffle(facts);
  std::vector<std::string> entries;
  for (const Fact& fact : facts) entries.push_back(fact.of + ": " + fact.is);
  return fmt::format("{}: {}.", heading, fmt::join(entries, ", "));
}

std::vector<Fact> places_of_names(const Scene& scene) {
  std::vector<Fact> facts;
  for (const SceneObject& object : scene.objects) facts.push_back({name(object), place_name(object.place)});
  return facts;
}

std::vector<Fact> places_of_kinds(const Scene& scene) {
  std::vector<Fact> facts;
  for (const SceneObject& object : scene.objects) {
    const std::string place = place_name(object.place);
    if (count_shape(scene, object.shape) == 1) facts.push_back({shape_name(object.shape), place});
    if (count_colour(scene, object.colour) == 1) facts.push_back({colour_name(object.colour), place});
  }
  return facts;
}

std::string places_by_name(const Scene& scene, Rng& rng) {
  return section("Places", places_of_names(scene), rng);
}
std::string places_by_kind(const Scene& scene, Rng& rng) {
  return section("Places", places_of_kinds(scene), rng);
}

std::string things_by_place(const Scene& scene, Rng& rng) {
  std::vector<Fact> facts;
  for (int place = 0; place < static_cast<int>(kPlaces.size()); ++place)
    facts.push_back({place_name(place), "empty"});
  for (const SceneObject& object : scene.objects) facts[static_cast<size_t>(object.place)].is = name(object);
  return section("Things", facts, rng);
}

std::string colours_by_shape(const Scene& scene, Rng& rng) {
  std::vector<Fact> facts;
  for (const SceneObject& object : scene.objects) {
    if (count_shape(scene, object.shape) == 1)
      facts.push_back({shape_name(object.shape), colour_name(object.colour)});
  }
  return section("Colours", facts, rng);
}

std::string shapes_by_colour(const Scene& scene, Rng& rng) {
  std::vector<Fact> facts;
  for (const SceneObject& object : scene.objects) {
    if (count_colour(scene, object.colour) == 1)
      facts.push_back({colour_name(object.colour), shape_name(object.shape)});
  }
  return section("Shapes", facts, rng);
}

// Of up to four kinds that occur and two that do not, how many there are.
std::vector<Fact> some_numbers(const Scene& scene, Rng& rng) {
  std::vector<Fact> present, absent;
  const auto add = [&](const std::string& kind, int64_t number) {
    (number > 0 ? present : absent).push_back({kind, std::to_string(number)});
  };
  for (int colour = 0; colour < static_cast<int>(kColours.size()); ++colour) {
    add(colour_name(colour), count_colour(scene, colour));
  }
  for (int shape = 0; shape < static_cast<int>(kShapes.size()); ++shape)
    add(shape_name(shape), count_shape(scene, shape));
  rng.shuffle(present);
  rng.shuffle(absent);
  present.resize(std::min<size_t>(present.size(), 4));
  present.insert(present.end(), absent.begin(), absent.begin() + 2);
  return present;
}

std::string numbers(const Scene& scene, Rng& rng) {
  return section("Numbers", some_numbers(scene, rng), rng);
}

std::string presence(const Scene& scene, Rng& rng) {
  std::vector<Fact> facts = some_numbers(scene, rng);
  for (Fact& fact : facts) fact.is = fact.is == "0" ? "no" : "yes";
  for (int i = 0; i < 2; ++i) {
    facts.push_back({name(rng.pick(scene.objects)), "yes"});
    const auto [colour, shape] = absent_pair(scene, rng);
    facts.push_back({colour_name(colour) + " " + shape_name(shape), "no"});
  }
  return section("Present", facts, rng);
}

constexpr std::array kSections = {places_by_name,   places_by_kind, things_by_place, colours_by_shape,
                                  shapes_by_colour, numbers,        presence};

}  // namespace

std::string short_caption(const Scene& scene, Rng& rng) {
  const bool place_first = rng.below(3) == 0;
  std::vector<std::string> parts;
  for (const SceneObject& object : in_any_order(scene, rng)) {
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
  for (uint64_t i = rng.below(4); i > 0; --i) caption += fmt::format(" {}", remark(scene, rng));
  const uint64_t wording = rng.below(4);
  for (const SceneObject& object : in_any_order(scene, rng)) {
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

std::string inventory(const Scene& scene, Rng& rng) {
  std::vector<std::string> sections;
  for (const int64_t i : rng.permutation(static_cast<int64_t>(kSections.size()))) {
    const std::string text = kSections[static_cast<size_t>(i)](scene, rng);
    if (!text.empty()) sections.push_back(text);
    if (sections.size() == 4) break;
  }
  return fmt::format("{}", fmt::join(sections, " "));
}

std::string place_list(const Scene& scene, Rng& rng) {
  std::vector<Fact> facts = places_of_names(scene);
  const std::vector<Fact> of_kinds = places_of_kinds(scene);
  facts.insert(facts.end(), of_kinds.begin(), of_kinds.end());
  return section("Places", facts, rng);
}

}  // namespace caldera
