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
  // Of the first turn: what a system turn before it says, in place of the template's own system message; ""
  // where there is none.
  std::string system = {};
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

// Whether each record must have an answer to learn from, or may be a question alone, for generation.
enum class Answers { kNeeded, kMayLack };

// A list in one .json, or .jsonl. "images" is the same as "image", and a "system" of the record the same as a
// first turn from "system". Throws DataError "FILE: record N (id "..."): what, expected, got" for a
// broken document, an unknown `from`, an order that does not alternate from human, an empty answer or none, a
// number of <image> that is not the number of images, or a key that other trainers give a meaning to which is
// not followed here ("video", "weight"). (LLaVA drops a first turn from gpt; so do we.)
std::vector<Record> read_records(const std::filesystem::path& file, Answers answers = Answers::kNeeded);

// Where pictures lie: below a folder, and below the roots that links in it may lead to.
struct ImageFolder {
  std::filesystem::path path;
  std::vector<std::filesystem::path> roots = {};  // image_roots

  ImageFolder() = default;
  ImageFolder(std::filesystem::path folder, std::vector<std::filesystem::path> link_roots = {})
      : path(std::move(folder)), roots(std::move(link_roots)) {}
  ImageFolder(const std::string& folder) : path(folder) {}
  ImageFolder(const char* folder) : path(folder) {}
};

// Where a record's image lies: below the folder or, by a link, below one of its roots. An absolute path must
// lie there, too; ".." is refused, and so is everything else.
std::filesystem::path image_path(const ImageFolder& folder, const std::string& image);

// Every image exists and begins and ends as a picture of its kind does (signature, size, end marker); the
// first 10 that do not are listed in one DataError. A name is looked at once, however many records show it,
// in as many threads as there are processors; `progress` is called in the calling thread before every few
// hundred, the first ones too, for those who must show signs of life.
void check_images(const std::vector<Record>& records, const ImageFolder& folder, const std::string& source,
                  const std::function<void()>& progress = {});

// The same, and decodes each picture: what is wrong inside of one shows nowhere else. `progress` is told how
// many pictures are done, and of how many.
void decode_images(const std::vector<Record>& records, const ImageFolder& folder, const std::string& source,
                   const std::function<void(int64_t, int64_t)>& progress = {});

}  // namespace caldera
