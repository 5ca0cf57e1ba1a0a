#include "base/strings.h"

#include <gtest/gtest.h>

namespace caldera {

TEST(Strings, NearMatchFindsTyposAndShortenings) {
  const std::vector<std::string> keys = {"learning_rate", "lr", "warmup_ratio", "weight_decay"};
  EXPECT_EQ(near_match("learing_rate", keys), "learning_rate");
  EXPECT_EQ(near_match("lrr", keys), "lr");
  EXPECT_EQ(near_match("warmup", keys), "warmup_ratio");
  EXPECT_EQ(near_match("zzzz", keys), "");
}

TEST(Strings, SplitKeepsEmptyParts) {
  EXPECT_EQ(split("a,,b", ","), (std::vector<std::string>{"a", "", "b"}));
  EXPECT_EQ(split("", ","), (std::vector<std::string>{""}));
}

TEST(Strings, HumanUnits) {
  EXPECT_EQ(human_bytes(812), "812 B");
  EXPECT_EQ(human_bytes(1.4e9), "1.4 GB");
  EXPECT_EQ(human_flops(269.53e12), "269.5 TFLOP");
  EXPECT_EQ(human_flops(7), "7 FLOP");
  EXPECT_EQ(human_duration(187), "3:07");
  EXPECT_EQ(human_duration(7509), "2:05:09");
}

}  // namespace caldera
