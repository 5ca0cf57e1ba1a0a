#include "base/hash.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <memory>
#include <vector>

#include "base/error.h"

namespace caldera {
// Read piece by piece: a mapped checkpoint would count as memory of the training, as large as its file.
std::string hash_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  CALDERA_CHECK(file.is_open(), Error, "{}: cannot be read: {}", path.string(), std::strerror(errno));
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  XXH3_128bits_reset(state.get());
  std::vector<char> piece(1 << 20);
  while (file.read(piece.data(), std::ssize(piece)) || file.gcount() > 0)
    XXH3_128bits_update(state.get(), piece.data(), static_cast<size_t>(file.gcount()));
  CALDERA_CHECK(file.eof(), Error, "{}: cannot be read: {}", path.string(), std::strerror(errno));
  const XXH128_hash_t hash = XXH3_128bits_digest(state.get());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace caldera
