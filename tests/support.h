// What tests of every folder use.
#pragma once
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/files.h"

namespace caldera {

inline const fs::path kGolden = fs::path(CALDERA_SOURCE_DIR) / "tests/golden";
inline const fs::path kGoldenPictures = kGolden / "image";

// A folder of its own, removed at the end.
class TemporaryFolder {
 public:
  explicit TemporaryFolder(const fs::path& parent = fs::temp_directory_path()) {
    std::string name = (parent / "caldera-test-XXXXXX").string();
    if (!::mkdtemp(name.data())) throw Error("mkdtemp");
    path_ = name;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() { fs::remove_all(path_); }
  const fs::path& path() const { return path_; }
  fs::path write(const std::string& name, std::string_view bytes) const {
    write_file_atomic(path_ / name, bytes);
    return path_ / name;
  }

 private:
  fs::path path_;
};

// The message of the error that this throws; "accepted" if none.
template <class ErrorType, class Function>
std::string error_of(Function function) {
  try {
    function();
  } catch (const ErrorType& error) {
    return error.what();
  }
  return "accepted";
}

// Whether bfloat16 values are the nearest to float32 ones; half way between two, either is.
inline bool is_nearest(const auto& rounded, const auto& values) {
  return ((rounded.to(values.scalar_type()) - values).abs() <= (values.to(rounded.scalar_type()).to(values.scalar_type()) - values).abs())
      .all()
      .template item<bool>();
}

}  // namespace caldera
