#include "eval/sheet.h"

#include <algorithm>
#include <map>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <set>

#include "base/error.h"
#include "base/files.h"
#include "base/rng.h"
#include "base/strings.h"
#include "data/image.h"
#include "data/record.h"

namespace caldera {
namespace {

constexpr int kCell_px = 256, kGap_px = 20, kTextHeight_px = 92, kLine_px = 20;
constexpr double kFontScale = 0.47;
constexpr int kFont = cv::FONT_HERSHEY_SIMPLEX;
// Blue, green, red.
const cv::Scalar kPaper(250, 251, 252), kInk(40, 34, 30), kFaint(130, 122, 115), kRight(72, 140, 30),
    kWrong(50, 50, 200);

cv::Mat load_bgr(const fs::path& file) {
  Image image = load_image(file);
  const cv::Mat rgb(static_cast<int>(image.height), static_cast<int>(image.width), CV_8UC3,
                    image.pixels.data());
  cv::Mat bgr;
  cv::cvtColor(rgb, bgr, cv::COLOR_RGB2BGR);
  return bgr;
}

// Scaled to fit a square of `max_px`. Small pictures grow by whole factors, so that their pixels stay what
// they are.
cv::Mat fit(const cv::Mat& picture, int max_px, bool may_grow) {
  const int longer = std::max(picture.rows, picture.cols);
  double factor = static_cast<double>(max_px) / longer;
  if (factor >= 1) factor = may_grow ? std::floor(factor) : 1;
  if (factor == 1) return picture;
  cv::Mat fitted;
  const cv::Size size(std::max(1, static_cast<int>(picture.cols * factor)),
                      std::max(1, static_cast<int>(picture.rows * factor)));
  cv::resize(picture, fitted, size, 0, 0, factor > 1 ? cv::INTER_NEAREST : cv::INTER_AREA);
  return fitted;
}

// The built-in fonts know ASCII alone.
std::string to_ascii(const std::string& text) {
  std::string ascii;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if ((byte & 0xC0) == 0x80) continue;  // goes with the lead byte before it
    ascii += byte >= 0x7F ? '?' : byte < 0x20 ? ' ' : c;
  }
  return ascii;
}

int text_width(const std::string& text) {
  int baseline = 0;
  return cv::getTextSize(text, kFont, kFontScale, 1, &baseline).width;
}

// Lines that fit the width, at most `limit`; what is left over ends in "...".
std::vector<std::string> wrap(const std::string& text, size_t limit, int width_px) {
  std::vector<std::string> lines = {""};
  for (std::string word : split(to_ascii(text), " ")) {
    if (word.empty()) continue;
    while (text_width(word) > width_px && word.size() > 1) word.pop_back();
    const std::string longer = lines.back().empty() ? word : lines.back() + " " + word;
    if (text_width(longer) <= width_px)
      lines.back() = longer;
    else
      lines.push_back(word);
  }
  if (lines.size() <= limit) return lines;
  lines.resize(limit);
  while (!lines.back().empty() && text_width(lines.back() + "...") > width_px) lines.back().pop_back();
  lines.back() += "...";
  return lines;
}

void draw_mark(cv::Mat& sheet, cv::Point at, bool is_right) {
  const auto stroke = [&](cv::Point from, cv::Point to) {
    cv::line(sheet, at + from, at + to, is_right ? kRight : kWrong, 2, cv::LINE_AA);
  };
  if (is_right) {
    stroke({0, -4}, {4, 0});
    stroke({4, 0}, {11, -10});
  } else {
    stroke({1, -9}, {10, 0});
    stroke({1, 0}, {10, -9});
  }
}

}  // namespace

std::vector<HeldoutAnswer> choose_for_sheet(const std::vector<HeldoutAnswer>& answers, int64_t num) {
  // Round robin over the types, each in an order drawn once; a picture is shown twice only when there are no
  // others.
  std::map<std::string, std::vector<const HeldoutAnswer*>> by_type;
  for (const int64_t index : Rng(answers.size()).permutation(static_cast<int64_t>(answers.size()))) {
    const HeldoutAnswer& answer = answers[static_cast<size_t>(index)];
    if (!answer.image.empty()) by_type[answer.type].push_back(&answer);
  }
  std::vector<HeldoutAnswer> chosen, second_choice;
  std::set<std::string> seen;
  for (size_t round = 0; static_cast<int64_t>(chosen.size()) < num; ++round) {
    bool any_left = false;
    for (const auto& [type, list] : by_type) {
      if (round >= list.size() || static_cast<int64_t>(chosen.size()) >= num) continue;
      any_left = true;
      (seen.insert(list[round]->image).second ? chosen : second_choice).push_back(*list[round]);
    }
    if (!any_left) break;
  }
  for (const HeldoutAnswer& answer : second_choice)
    if (static_cast<int64_t>(chosen.size()) < num) chosen.push_back(answer);
  return chosen;
}

std::string thumbnail(const fs::path& file, int64_t max_px, std::string& mime) {
  const cv::Mat picture = fit(load_bgr(file), static_cast<int>(max_px), false);
  const bool is_small = std::max(picture.rows, picture.cols) <= 128;
  mime = is_small ? "image/png" : "image/jpeg";
  std::vector<uchar> bytes;
  CALDERA_CHECK(cv::imencode(is_small ? ".png" : ".jpg", picture, bytes), Error,
                "{}: cannot encode a thumbnail", file.string());
  return std::string(bytes.begin(), bytes.end());
}

void write_sheet(const fs::path& file, const std::vector<HeldoutAnswer>& answers,
                 const fs::path& image_folder) {
  const int num = static_cast<int>(answers.size());
  const int num_columns = std::clamp(num, 1, 6);
  const int num_rows = std::max(1, (num + num_columns - 1) / num_columns);
  const int column_px = kCell_px + kGap_px, row_px = kCell_px + kTextHeight_px + kGap_px;
  cv::Mat sheet(num_rows * row_px + kGap_px, num_columns * column_px + kGap_px, CV_8UC3, kPaper);
  for (int i = 0; i < num; ++i) {
    const HeldoutAnswer& answer = answers[static_cast<size_t>(i)];
    const int left = kGap_px + i % num_columns * column_px, top = kGap_px + i / num_columns * row_px;
    const cv::Mat picture = fit(load_bgr(image_path(image_folder, answer.image)), kCell_px, true);
    picture.copyTo(sheet(cv::Rect(left + (kCell_px - picture.cols) / 2, top + (kCell_px - picture.rows) / 2,
                                  picture.cols, picture.rows)));
    int y = top + kCell_px + 22;
    const auto write_line = [&](const std::string& text, int indent, const cv::Scalar& colour) {
      cv::putText(sheet, text, {left + indent, y}, kFont, kFontScale, colour, 1, cv::LINE_AA);
      y += kLine_px;
    };
    for (const std::string& line : wrap(answer.question, 2, kCell_px)) write_line(line, 0, kInk);
    draw_mark(sheet, {left, y - 1}, answer.is_right);
    const int indent = 18;
    write_line(wrap(answer.given.empty() ? "(nothing)" : answer.given, 1, kCell_px - indent)[0], indent,
               answer.is_right ? kRight : kWrong);
    if (!answer.is_right)
      write_line(wrap("expected: " + answer.expected, 1, kCell_px - indent)[0], indent, kFaint);
  }
  std::vector<uchar> bytes;
  CALDERA_CHECK(cv::imencode(".png", sheet, bytes), Error, "{}: cannot encode the sheet", file.string());
  write_file_atomic(file, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

}  // namespace caldera
