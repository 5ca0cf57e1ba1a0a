// Where records' images lie, and whether they are there: the parts of record.h that look at the file system.
#include <fmt/ranges.h>

#include <string_view>
#include <unordered_map>

#include "base/error.h"
#include "base/files.h"
#include "data/each.h"
#include "data/image.h"
#include "data/image_format.h"
#include "data/record.h"

namespace caldera {
namespace {

// Throws what is wrong with a picture.
using Look = void (*)(std::string_view bytes, const std::string& where);

std::string fault_of(const ImageFolder& folder, const std::string& image, Look look) {
  try {
    const MappedFile file(image_path(folder, image));
    const auto bytes = file.bytes();
    look({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, file.path().string());
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

void look_at_images(const std::vector<Record>& records, const ImageFolder& folder, const std::string& source,
                    Look look, const std::function<void(int64_t, int64_t)>& progress) {
  constexpr size_t kMaxListed = 10;
  std::unordered_map<std::string_view, size_t> place_of;  // many records may share one
  std::vector<std::string_view> images;
  for (const Record& record : records)
    for (const std::string& image : record.images)
      if (place_of.try_emplace(image, images.size()).second) images.push_back(image);

  std::vector<std::string> fault_at(images.size());
  const auto tell = [&](int64_t done) {
    if (progress) progress(done, std::ssize(images));
  };
  for_each_index(
      images.size(), [&](size_t i) { fault_at[i] = fault_of(folder, std::string(images[i]), look); }, tell);

  std::vector<std::string> faults;
  int64_t num_faults = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    for (const std::string& image : records[i].images) {
      const std::string& fault = fault_at[place_of.at(image)];
      if (fault.empty()) continue;
      ++num_faults;
      if (faults.size() < kMaxListed)
        faults.push_back(fmt::format("  record {} (id \"{}\"): {}", i, records[i].id, fault));
    }
  }
  if (num_faults == 0) return;
  const std::string more =
      num_faults > static_cast<int64_t>(kMaxListed) ? fmt::format(", of which the first {}", kMaxListed) : "";
  throw DataError(
      fmt::format("{}: {} images cannot be used{}:\n{}", source, num_faults, more, fmt::join(faults, "\n")));
}

}  // namespace

std::filesystem::path image_path(const ImageFolder& folder, const std::string& image) {
  const fs::path name(image);
  const auto refuse = [&](const std::string& why) {
    throw DataError(fmt::format("image \"{}\": {}; a record's image must lie below the image folder {}",
                                image.c_str(), why, folder.path.string()));
  };
  if (image.empty()) refuse("an empty path");
  if (image.find('\0') != std::string::npos) refuse("a path with a zero byte");
  for (const fs::path& part : name) {
    if (part == "..") refuse("a path with \"..\"");
  }
  const auto resolve = [&](const fs::path& path) {
    std::error_code error;
    fs::path resolved = fs::weakly_canonical(path, error);
    if (error) refuse(error.message());
    return resolved;
  };
  const fs::path root = resolve(folder.path);
  const fs::path path = root / name;  // `name` itself where it is absolute
  const fs::path target = resolve(path);
  if (target == root) refuse("the image folder itself");
  const auto is_below = [&](const fs::path& place) {
    return std::mismatch(place.begin(), place.end(), target.begin(), target.end()).first == place.end();
  };
  if (is_below(root)) return path;
  for (const fs::path& other : folder.roots)
    if (is_below(resolve(other))) return path;
  if (name.is_absolute()) refuse("an absolute path that lies elsewhere");
  refuse(fmt::format(
      "a link that leads out of the image folder, to {}: name the folder that links may lead to in "
      "image_roots",
      target.string()));
  return {};
}

void check_images(const std::vector<Record>& records, const ImageFolder& folder, const std::string& source,
                  const std::function<void()>& progress) {
  const auto look = [](std::string_view bytes, const std::string& where) { probe_image(bytes, where); };
  look_at_images(records, folder, source, look, [&](int64_t, int64_t) {
    if (progress) progress();
  });
}

void decode_images(const std::vector<Record>& records, const ImageFolder& folder, const std::string& source,
                   const std::function<void(int64_t, int64_t)>& progress) {
  const auto look = [](std::string_view bytes, const std::string& where) { decode_image(bytes, where); };
  look_at_images(records, folder, source, look, progress);
}

}  // namespace caldera
