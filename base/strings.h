// Small text helpers.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace caldera {

std::string strip(std::string_view text);  // without leading and trailing ASCII white space
std::vector<std::string> split(std::string_view text, std::string_view separator);
std::string join(const std::vector<std::string>& parts, std::string_view separator);
std::string replace_all(std::string text, std::string_view from, std::string_view to);
// The candidate nearest to `word` by edit distance, or "" if none is near (more than a third of its letters off).
std::string near_match(std::string_view word, const std::vector<std::string>& candidates);
// "; did you mean \"x\"?" for a near match, else "; known: a, b, c".
std::string suggestion(std::string_view word, const std::vector<std::string>& candidates);
// "1.4 GB", "12.3 MB", "812 B" (powers of 1000).
std::string human_bytes(double num_bytes);
// "3.2 TFLOP" in powers of ten.
std::string human_flops(double num_operations);
// "2:05:09" or "3:07" from seconds.
std::string human_duration(double seconds);

}  // namespace caldera
