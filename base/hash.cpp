#include "base/hash.h"

#include <fmt/format.h>
#include <xxhash.h>

#include "base/files.h"

namespace caldera {

std::string hash_bytes(const void* bytes, size_t num_bytes) {
  const XXH128_hash_t hash = XXH3_128bits(bytes, num_bytes);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

std::string hash_file(const std::filesystem::path& path) {
  const MappedFile file(path);
  return hash_bytes(file.bytes().data(), file.bytes().size());
}

}  // namespace caldera
