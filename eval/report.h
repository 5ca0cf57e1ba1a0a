// What a run leaves for people to look at: OUTPUT/report.html (self-contained) and OUTPUT/sheet.png.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "eval/heldout.h"
#include "train/recipe.h"

namespace caldera {

struct Report {
  std::filesystem::path output;  // the run's folder: metrics are read there, the report goes there
  std::filesystem::path model;   // what the command to ask more names
  std::string title;
  std::vector<std::string> stages;      // whose OUTPUT/STAGE/metrics.jsonl are drawn
  std::string recipe_yaml;              // resolved
  std::optional<HeldoutResult> result;  // absent: curves alone
  double train_seconds = 0;
  std::filesystem::path image_folder;  // of the result's pictures
  int64_t num_sheet = 24;
};

// Writes both files (the sheet only where there are answers with pictures).
void write_report(const Report& report);

// Opens the finished run's model, measures what recipe.evaluation asks, and writes OUTPUT/results.json,
// answers.jsonl, report.html and sheet.png. Without an evaluation block: report.html alone, and an empty
// result.
std::optional<HeldoutResult> evaluate_run(
    const Recipe& recipe, const std::function<void(const std::string&, int64_t, int64_t)>& progress = {});

// One line an answer: {"id", "type", "image", "question", "expected", "given", "right"}.
std::string answers_jsonl(const HeldoutResult& result);

}  // namespace caldera
