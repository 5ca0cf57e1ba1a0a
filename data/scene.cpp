#include "data/scene.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <opencv2/imgproc.hpp>

#include "base/error.h"

namespace caldera {
namespace {

constexpr int kSubpixelBits = 8;
constexpr std::array<std::array<int, 3>, kColours.size()> kRgb = {{{215, 40, 40},
                                                                   {245, 140, 30},
                                                                   {245, 225, 55},
                                                                   {45, 170, 65},
                                                                   {45, 85, 220},
                                                                   {140, 55, 190},
                                                                   {250, 150, 200}}};
// Furthest point of each shape relative to a circle of about the same weight to the eye.
constexpr std::array<double, kShapes.size()> kReach = {1.0, 1.2, 1.3, 1.3, 1.15};

// purple circle, blue square, green triangle, red star, orange cross
constexpr std::array<int, kShapes.size()> kHeldOutColour = {5, 4, 3, 0, 1};

struct Point {
  double x, y;
};

// Outline around the origin, furthest point at distance 1, y downwards.
std::vector<Point> unit_outline(int shape) {
  constexpr double pi = std::numbers::pi;
  std::vector<Point> points;
  const auto ring = [&](int count, double start, double inner) {
    for (int i = 0; i < count; ++i) {
      const double radius = i % 2 == 0 ? 1.0 : inner, angle = start + 2 * pi * i / count;
      points.push_back({radius * std::cos(angle), radius * std::sin(angle)});
    }
  };
  switch (shape) {
    case 0:
      ring(48, 0, 1);
      break;
    case 1:
      ring(4, pi / 4, 1);
      break;
    case 2:
      ring(3, -pi / 2, 1);
      break;
    case 3:
      ring(10, -pi / 2, 0.42);
      break;
    default: {
      const double arm = 0.33, reach = std::sqrt(1 - arm * arm);
      for (int i = 0; i < 4; ++i) {  // right, bottom, left, top
        const double c = std::cos(pi / 2 * i), s = std::sin(pi / 2 * i);
        for (const Point p : {Point{arm, -arm}, Point{reach, -arm}, Point{reach, arm}}) {
          points.push_back({c * p.x - s * p.y, s * p.x + c * p.y});
        }
      }
    }
  }
  return points;
}

std::vector<Point> outline(const SceneObject& object) {
  const double c = std::cos(object.angle), s = std::sin(object.angle);
  std::vector<Point> points = unit_outline(object.shape);
  for (Point& p : points) {
    p = {object.center_x + object.radius * (c * p.x - s * p.y),
         object.center_y + object.radius * (s * p.x + c * p.y)};
  }
  return points;
}

double between(Rng& rng, double low, double high) { return low + (high - low) * rng.uniform(); }

SceneObject place_object(Rng& rng, int colour, int shape, int place) {
  SceneObject object{colour, shape, place};
  // Of a side of 64 pixels: radius 9.5 to 11 for a circle; the centre leaves its quadrant's middle by at
  // most 1: a tower this small learns places quickly, and outlines that move about slowly.
  object.radius = between(rng, 9.5, 11) / 64 * kReach[static_cast<size_t>(shape)];
  const double slack = std::clamp(15.5 / 64 - object.radius, 0.0, 1.0 / 64);
  object.center_x = (place % 2 == 0 ? 0.25 : 0.75) + between(rng, -slack, slack);
  object.center_y = (place / 2 == 0 ? 0.25 : 0.75) + between(rng, -slack, slack);
  object.angle = between(rng, -0.1, 0.1);
  return object;
}

// Grey with a tint, so that no background is mistaken for a shape's colour.
std::array<double, 3> background_colour(Rng& rng) {
  const double grey = between(rng, 10, 60);
  return {grey + between(rng, -14, 14), grey + between(rng, -14, 14), grey + between(rng, -14, 14)};
}

// Plain, a gradient in any direction, or noise; always darker than the shapes, so that a small tower can tell
// figure from ground without having to learn both polarities of every outline.
cv::Mat draw_background(Rng& rng, int size_px) {
  const std::array<double, 3> from = background_colour(rng), to = background_colour(rng);
  const uint64_t kind = rng.below(3);
  const double direction = between(rng, 0, 2 * std::numbers::pi), noise = between(rng, 4, 12);
  cv::Mat picture(size_px, size_px, CV_8UC3);
  for (int y = 0; y < size_px; ++y) {
    for (int x = 0; x < size_px; ++x) {
      const double u = (x + 0.5) / size_px - 0.5, v = (y + 0.5) / size_px - 0.5;
      const double mix =
          kind == 1 ? std::clamp(0.5 + u * std::cos(direction) + v * std::sin(direction), 0.0, 1.0) : 0;
      const double grain = kind == 2 ? between(rng, -noise, noise) : 0;
      auto& pixel = picture.at<cv::Vec3b>(y, x);
      for (int c = 0; c < 3; ++c) {
        const auto i = static_cast<size_t>(c);
        pixel[c] = cv::saturate_cast<uint8_t>(from[i] + (to[i] - from[i]) * mix + grain);
      }
    }
  }
  return picture;
}

}  // namespace

std::array<double, 4> SceneObject::box() const {
  std::array<double, 4> box = {1, 1, 0, 0};
  for (const Point& p : outline(*this)) {
    box = {std::min(box[0], p.x), std::min(box[1], p.y), std::max(box[2], p.x), std::max(box[3], p.y)};
  }
  return box;
}

bool is_held_out(int colour, int shape) { return kHeldOutColour[static_cast<size_t>(shape)] == colour; }

Scene sample_scene(Rng& rng, bool with_held_out) {
  const auto num_objects = static_cast<size_t>(rng.between(1, 4));
  std::vector<int64_t> places = rng.permutation(static_cast<int64_t>(kPlaces.size()));
  places.resize(num_objects);
  Scene scene;
  const size_t held_out_at = rng.below(num_objects);
  while (scene.objects.size() < num_objects) {
    const size_t i = scene.objects.size();
    int colour = static_cast<int>(rng.below(kColours.size())),
        shape = static_cast<int>(rng.below(kShapes.size()));
    // Colours and shapes often come twice, so that counting and "is there a red circle?" need a look at the
    // pairs.
    if (i > 0 && rng.below(3) == 0) colour = scene.objects[rng.below(i)].colour;
    if (i > 0 && rng.below(3) == 0) shape = scene.objects[rng.below(i)].shape;
    const bool is_due = with_held_out && i == held_out_at;
    if (is_due) colour = kHeldOutColour[static_cast<size_t>(shape)];
    if (is_held_out(colour, shape) && !is_due) continue;
    const bool is_taken =
        std::any_of(scene.objects.begin(), scene.objects.end(),
                    [&](const SceneObject& other) { return other.colour == colour && other.shape == shape; });
    if (!is_taken) scene.objects.push_back(place_object(rng, colour, shape, static_cast<int>(places[i])));
  }
  std::sort(scene.objects.begin(), scene.objects.end(),
            [](const SceneObject& a, const SceneObject& b) { return a.place < b.place; });
  scene.texture_seed = rng.next();
  return scene;
}

cv::Mat draw_scene(const Scene& scene, int size_px) {
  Rng rng(scene.texture_seed);
  cv::Mat picture = draw_background(rng, size_px);
  for (const SceneObject& object : scene.objects) {
    std::vector<cv::Point> points;
    // OpenCV's pixel centres lie on whole numbers.
    const auto fixed = [&](double position) {
      return static_cast<int>(std::lround((position * size_px - 0.5) * (1 << kSubpixelBits)));
    };
    for (const Point& p : outline(object)) points.emplace_back(fixed(p.x), fixed(p.y));
    const double light = between(rng, 0.85, 1.08);
    cv::Scalar colour;
    for (int c = 0; c < 3; ++c) {
      colour[c] = std::clamp(
          kRgb[static_cast<size_t>(object.colour)][static_cast<size_t>(c)] * light + between(rng, -10, 10),
          0.0, 255.0);
    }
    cv::fillPoly(picture, std::vector<std::vector<cv::Point>>{points}, colour, cv::LINE_AA, kSubpixelBits);
  }
  return picture;
}

}  // namespace caldera
