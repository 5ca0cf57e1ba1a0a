#include "eval/html.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

namespace caldera {
namespace {

TEST(EscapeHtml, NothingOfItCanBeMarkup) {
  EXPECT_EQ(escape_html("<b a=\"1\" c='2'>&"), "&lt;b a=&quot;1&quot; c=&#39;2&#39;&gt;&amp;");
  EXPECT_EQ(escape_html("caf\xC3\xA9 \xE2\x9C\x93 \xF0\x9F\x90\x8E"),
            "caf\xC3\xA9 \xE2\x9C\x93 \xF0\x9F\x90\x8E");
}

TEST(EscapeHtml, BrokenBytesBecomeReplacementCharacters) {
  const std::string bad = "\xEF\xBF\xBD";
  EXPECT_EQ(escape_html("a\xFF"), "a" + bad);
  EXPECT_EQ(escape_html("\xC3"), bad);                                // cut off
  EXPECT_EQ(escape_html("\xC0\xAF"), bad + bad);                      // overlong "/"
  EXPECT_EQ(escape_html("\xED\xA0\x80"), bad + bad + bad);            // a surrogate
  EXPECT_EQ(escape_html("\xF4\x90\x80\x80"), bad + bad + bad + bad);  // beyond Unicode
  EXPECT_EQ(escape_html(std::string("a\0b\x1B[1m", 7)), "ab[1m");
}

TEST(Base64, KnownAnswers) {  // RFC 4648, section 10
  EXPECT_EQ(base64(""), "");
  EXPECT_EQ(base64("f"), "Zg==");
  EXPECT_EQ(base64("fo"), "Zm8=");
  EXPECT_EQ(base64("foo"), "Zm9v");
  EXPECT_EQ(base64("foobar"), "Zm9vYmFy");
  EXPECT_EQ(base64("\xFF\xFE\xFD"), "//79");
}

TEST(ShellQuote, QuotesWhatAShellWouldRead) {
  EXPECT_EQ(shell_quote("output/scenes"), "output/scenes");
  EXPECT_EQ(shell_quote("What's $HOME?"), "'What'\\''s $HOME?'");
  EXPECT_EQ(shell_quote(""), "''");
}

TEST(ChartTicks, AreRoundAndInside) {
  EXPECT_THAT(chart_ticks(0, 10), ::testing::ElementsAre(0, 2, 4, 6, 8, 10));
  for (const auto& [low, high] : {std::pair{0.0, 1.0}, {0.37, 0.41}, {-3.0, 250.0}, {5.0, 5.0}}) {
    const std::vector<double> ticks = chart_ticks(low, high);
    EXPECT_GE(ticks.size(), 1u);
    EXPECT_LE(ticks.size(), 7u);
    for (const double tick : ticks) {
      EXPECT_GE(tick, low - 1e-9);
      EXPECT_LE(tick, high + 1e-9);
    }
  }
}

TEST(SvgChart, SkipsWhatIsNotANumber) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(svg_chart({.line = {{1, kNan}, {2, kNan}}}), "");
  const std::string svg =
      svg_chart({.line = {{1, 3.0}, {2, kNan}, {3, 1.0}}, .dots = {{3, 1.5}}, .line_label = "a<b"});
  EXPECT_THAT(svg, ::testing::StartsWith("<svg"));
  EXPECT_THAT(svg, ::testing::EndsWith("</svg>"));
  EXPECT_THAT(svg, ::testing::Not(::testing::HasSubstr("nan")));
  EXPECT_THAT(svg, ::testing::HasSubstr("a&lt;b"));
  EXPECT_THAT(svg, ::testing::HasSubstr("<circle"));
}

TEST(SvgChart, OnePointIsDrawnToo) {
  const std::string svg = svg_chart({.line = {{1, 2.0}}});
  EXPECT_THAT(svg, ::testing::HasSubstr("<path"));
  EXPECT_THAT(svg, ::testing::Not(::testing::HasSubstr("nan")));
  EXPECT_THAT(svg, ::testing::Not(::testing::HasSubstr("inf")));
}

}  // namespace
}  // namespace caldera
