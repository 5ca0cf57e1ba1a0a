// Where records' images lie, and whether they are there: the parts of record.h that look at the file system.
#include <fmt/ranges.h>

#include <string_view>
#include <unordered_map>

#include "base/error.h"
#include "base/files.h"
#include "data/image_format.h"
#include "data/record.h"

namespace caldera {
namespace {

// What is wrong with a picture, "" where nothing is.
std::string fault_of(const std::filesystem::path& folder, const std::string& image) {
  try {
    const MappedFile file(image_path(folder, image));
    const auto bytes = file.bytes();
    probe_image({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, file.path().string());
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

}  // namespace

std::filesystem::path image_path(const std::filesystem::path& folder, const std::string& image) {
  const fs::path relative(image);
  const auto refuse = [&](const char* why) {
    throw DataError(fmt::format("image \"{}\": {}; a record's image must lie below the image folder {}",
                                image.c_str(), why, folder.string()));
  };
  if (image.empty()) refuse("an empty path");
  if (image.find('\0') != std::string::npos) refuse("a path with a zero byte");
  if (relative.is_absolute()) refuse("an absolute path");
  for (const fs::path& part : relative) {
    if (part == "..") refuse("a path with \"..\"");
  }
  std::error_code error;
  const fs::path root = fs::weakly_canonical(folder, error);
  const fs::path target = error ? fs::path() : fs::weakly_canonical(root / relative, error);
  if (error) refuse(error.message().c_str());
  const auto [root_end, target_end] = std::mismatch(root.begin(), root.end(), target.begin(), target.end());
  if (root_end != root.end()) refuse("a link that leads out of the image folder");
  if (target_end == target.end()) refuse("the image folder itself");
  return root / relative;
}

void check_images(const std::vector<Record>& records, const std::filesystem::path& folder,
                  const std::string& source, const std::function<void()>& progress) {
  constexpr size_t kMaxListed = 10, kRecordsBetweenCalls = 1000;
  std::unordered_map<std::string_view, std::string> fault_by_image;  // many records may share one
  std::vector<std::string> faults;
  int64_t num_faults = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    if (progress && i % kRecordsBetweenCalls == 0) progress();
    for (const std::string& image : records[i].images) {
      const auto [known, is_new] = fault_by_image.try_emplace(image);
      if (is_new) known->second = fault_of(folder, image);
      if (known->second.empty()) continue;
      ++num_faults;
      if (faults.size() < kMaxListed)
        faults.push_back(fmt::format("  record {} (id \"{}\"): {}", i, records[i].id, known->second));
    }
  }
  if (num_faults == 0) return;
  const std::string more =
      num_faults > static_cast<int64_t>(kMaxListed) ? fmt::format(", of which the first {}", kMaxListed) : "";
  throw DataError(
      fmt::format("{}: {} images cannot be used{}:\n{}", source, num_faults, more, fmt::join(faults, "\n")));
}

}  // namespace caldera
