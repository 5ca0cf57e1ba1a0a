// Checksums of what we write, so that bit rot is found before it is used.
#pragma once
#include <filesystem>
#include <string>

namespace caldera {

// XXH3-128 of a file's bytes, as 32 hex digits. Throws Error naming the file.
std::string hash_file(const std::filesystem::path& path);

}  // namespace caldera
