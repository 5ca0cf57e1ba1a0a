// Samples as LLaVA's JSON has them, checked as they are read.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace caldera {

struct Turn {
  bool from_human = true;
  std::string value;  // with its <image> placeholders
};

struct Record {
  std::string id;
  std::vector<std::string> images;  // paths relative to the image folder; empty: text only
  std::vector<Turn> turns;          // human first, then alternating
  // Extra fields that evaluation uses: "type" of question (empty where absent), and "held_out", whether it
  // asks for what training never showed.
  std::string type;
  std::optional<bool> held_out = {};
};

// A list in one .json, or .jsonl. Throws DataError "FILE: record N (id "..."): what, expected, got" for a
// broken document, an unknown `from`, an order that does not alternate from human, an empty answer, or a
// number of <image> that is not the number of images. (LLaVA drops a first turn from gpt; so do we.)
std::vector<Record> read_records(const std::filesystem::path& file);

// Where a record's image lies: below the folder, nowhere else ("..", absolute paths and links out are
// refused).
std::filesystem::path image_path(const std::filesystem::path& folder, const std::string& image);

// Every image exists and begins and ends as a picture of its kind does (signature, size, end marker); the
// first 10 that do not are listed in one DataError. A name is looked at once, however many records show it; `progress`
// is called before every thousandth record, the first one too, for those who must show signs of life.
void check_images(const std::vector<Record>& records, const std::filesystem::path& folder,
                  const std::string& source, const std::function<void()>& progress = {});

}  // namespace caldera
