#include "eval/html.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "base/strings.h"

namespace caldera {
namespace {

// Length of the valid UTF-8 sequence at the front, or 0.
size_t sequence_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned lead = byte(0);
  const size_t length = lead < 0x80                   ? 1
                        : lead >= 0xC2 && lead < 0xE0 ? 2
                        : lead >= 0xE0 && lead < 0xF0 ? 3
                        : lead >= 0xF0 && lead < 0xF5 ? 4
                                                      : 0;
  if (length == 0 || length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  // Overlong forms, surrogates, and beyond U+10FFFF.
  if (lead == 0xE0 && byte(1) < 0xA0) return 0;
  if (lead == 0xED && byte(1) >= 0xA0) return 0;
  if (lead == 0xF0 && byte(1) < 0x90) return 0;
  if (lead == 0xF4 && byte(1) >= 0x90) return 0;
  return length;
}

// Means of runs of neighbours, so that at most `limit` points remain.
Chart::Points thin_out(const Chart::Points& points, size_t limit) {
  const size_t run = (points.size() + limit - 1) / limit;
  if (run <= 1) return points;
  Chart::Points thin;
  for (size_t begin = 0; begin < points.size(); begin += run) {
    const size_t end = std::min(begin + run, points.size());
    double x = 0, y = 0;
    for (size_t i = begin; i < end; ++i) {
      x += points[i].first;
      y += points[i].second;
    }
    const auto num = static_cast<double>(end - begin);
    thin.emplace_back(x / num, y / num);
  }
  return thin;
}

// Centred moving average over a twenty-fifth of the curve; narrower at its ends, so that it begins and ends
// where the curve does.
Chart::Points smooth(const Chart::Points& points) {
  const size_t reach = points.size() / 50;
  Chart::Points result;
  for (size_t i = 0; i < points.size(); ++i) {
    const size_t r = std::min({reach, i, points.size() - 1 - i});
    double sum = 0;
    for (size_t k = i - r; k <= i + r; ++k) sum += points[k].second;
    result.emplace_back(points[i].first, sum / static_cast<double>(2 * r + 1));
  }
  return result;
}

void keep_finite(Chart::Points& points) {
  std::erase_if(
      points, [](const auto& point) { return !std::isfinite(point.first) || !std::isfinite(point.second); });
}

}  // namespace

std::string escape_html(std::string_view text) {
  std::string escaped;
  while (!text.empty()) {
    const size_t length = sequence_length(text);
    const char c = text[0];
    if (length == 0)
      escaped += "\xEF\xBF\xBD";
    else if (c == '&')
      escaped += "&amp;";
    else if (c == '<')
      escaped += "&lt;";
    else if (c == '>')
      escaped += "&gt;";
    else if (c == '"')
      escaped += "&quot;";
    else if (c == '\'')
      escaped += "&#39;";
    else if (length > 1 || (static_cast<unsigned char>(c) >= 0x20 && c != 0x7F) || c == '\n' || c == '\t')
      escaped += text.substr(0, length);
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return escaped;
}

std::string base64(std::string_view bytes) {
  constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const auto byte = [&](size_t k) {
      return k < bytes.size() ? static_cast<uint32_t>(static_cast<unsigned char>(bytes[k])) : 0;
    };
    const uint32_t word = byte(i) << 16 | byte(i + 1) << 8 | byte(i + 2);
    text += kAlphabet[word >> 18];
    text += kAlphabet[word >> 12 & 63];
    text += i + 1 < bytes.size() ? kAlphabet[word >> 6 & 63] : '=';
    text += i + 2 < bytes.size() ? kAlphabet[word & 63] : '=';
  }
  return text;
}

std::string shell_quote(const std::string& word) {
  constexpr const char* kPlain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-./=:,+@%";
  if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) return word;
  return fmt::format("'{}'", replace_all(word, "'", "'\\''"));
}

std::vector<double> chart_ticks(double low, double high) {
  const double span = std::max(high - low, 1e-12);
  const double rough = span / 5;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  double step = 10 * power;
  for (const double factor : {1.0, 2.0, 2.5, 5.0})
    if (factor * power >= rough) {
      step = factor * power;
      break;
    }
  std::vector<double> ticks;
  for (double k = std::ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1)
    ticks.push_back(k * step);
  return ticks;
}

std::string svg_chart(const Chart& chart) {
  constexpr double kWidth = 720, kHeight = 260, kLeft = 52, kRight = 12, kTop = 14, kBottom = 42;
  Chart::Points line = chart.line, dots = chart.dots;
  keep_finite(line);
  keep_finite(dots);
  if (line.empty() && dots.empty()) return "";
  line = thin_out(line, 500);
  const Chart::Points bold = smooth(line);

  // The axis spans the smooth curve and the dots, with room for the noise near it; single spikes run out of
  // the frame.
  double x_min = 1e300, x_max = -1e300, y_min = 1e300, y_max = -1e300;
  for (const Chart::Points* points : {&bold, static_cast<const Chart::Points*>(&dots)})
    for (const auto& [x, y] : *points) {
      x_min = std::min(x_min, x);
      x_max = std::max(x_max, x);
      y_min = std::min(y_min, y);
      y_max = std::max(y_max, y);
    }
  const double room = std::max(0.06 * (y_max - y_min), 1e-6 * std::max(1.0, std::abs(y_max)));
  const bool from_zero = y_min >= 0 && y_min < 0.35 * y_max;  // near enough: show the floor itself
  y_min = from_zero ? 0 : y_min - room;
  y_max += room;
  if (x_max <= x_min) x_max = x_min + 1;
  const auto at_x = [&](double x) {
    return kLeft + (x - x_min) / (x_max - x_min) * (kWidth - kLeft - kRight);
  };
  const auto at_y = [&](double y) {
    const double inside = std::clamp(y, y_min, y_max);
    return kHeight - kBottom - (inside - y_min) / (y_max - y_min) * (kHeight - kTop - kBottom);
  };
  const auto path = [&](const Chart::Points& points) {
    std::string d;
    for (const auto& [x, y] : points)
      d += fmt::format("{}{:.1f} {:.1f}", d.empty() ? "M" : "L", at_x(x), at_y(y));
    return d;
  };

  std::string svg = fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">", kWidth, kHeight,
                                escape_html(chart.line_label));
  for (const double tick : chart_ticks(y_min, y_max))
    svg += fmt::format(
        "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/><text x=\"{}\" y=\"{:.1f}\" "
        "text-anchor=\"end\">{:.4g}</text>",
        kLeft, kWidth - kRight, at_y(tick), at_y(tick), kLeft - 8, at_y(tick) + 4,
        std::abs(tick) < 1e-12 ? 0 : tick);
  for (const double tick : chart_ticks(x_min, x_max))
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{:.6g}</text>", at_x(tick),
                       kHeight - kBottom + 19, tick);
  svg += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", kWidth - kRight, kHeight - 3,
                     escape_html(chart.x_label));
  if (!line.empty())
    svg +=
        fmt::format("<path class=\"raw\" d=\"{}\"/><path class=\"bold\" d=\"{}\"/>", path(line), path(bold));
  for (const auto& [x, y] : dots)
    svg += fmt::format("<circle class=\"dot\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.5\"/>", at_x(x), at_y(y));
  double legend_x = kWidth - kRight - 8;
  if (!dots.empty() && !chart.dots_label.empty()) {
    svg += fmt::format("<text class=\"dots-label\" x=\"{}\" y=\"{}\" text-anchor=\"end\">● {}</text>",
                       legend_x, kTop + 12, escape_html(chart.dots_label));
    legend_x -= 8.0 * static_cast<double>(chart.dots_label.size()) + 30;
  }
  svg += fmt::format("<text class=\"line-label\" x=\"{}\" y=\"{}\" text-anchor=\"end\">— {}</text></svg>",
                     legend_x, kTop + 12, escape_html(chart.line_label));
  return svg;
}

}  // namespace caldera
