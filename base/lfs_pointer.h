// Git LFS keeps a large file as a pointer of three short lines until it is fetched: what a clone without
// git-lfs leaves.
#pragma once
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"

namespace caldera {

inline bool is_lfs_pointer(std::string_view start) {
  return start.starts_with("version https://git-lfs.github.com/spec/");
}

// Throws CheckpointError naming the file and what to do, where `start` (the file's first bytes) is a
// pointer's.
inline void refuse_lfs_pointer(std::string_view start, const std::string& file) {
  CALDERA_CHECK(!is_lfs_pointer(start), CheckpointError,
                "{}: a pointer of Git LFS, not the file itself: fetch it with \"git lfs pull\" in its "
                "folder, or download "
                "it again",
                file);
}
inline void refuse_lfs_pointer(std::span<const std::byte> start, const std::string& file) {
  refuse_lfs_pointer(std::string_view(reinterpret_cast<const char*>(start.data()), start.size()), file);
}

}  // namespace caldera
