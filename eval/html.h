// Pieces of a self-contained HTML page.
#pragma once
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace caldera {

// Text for an element or a quoted attribute: & < > " ' become entities, control characters vanish, broken
// UTF-8 becomes U+FFFD.
std::string escape_html(std::string_view text);

std::string base64(std::string_view bytes);

// A word as a shell takes it: in single quotes unless it is plain.
std::string shell_quote(const std::string& word);

// A line chart as inline SVG, coloured by the page's CSS variables (--line, --faint, --dot, --text).
struct Chart {
  using Points = std::vector<std::pair<double, double>>;
  Points line;  // drawn faint as measured, and bold as a moving average
  Points dots;  // a second, sparser series
  std::string line_label, dots_label, x_label;
};
// "" where there is nothing finite to draw.
std::string svg_chart(const Chart& chart);

// 3 to 6 round numbers that span [low, high].
std::vector<double> chart_ticks(double low, double high);

}  // namespace caldera
