#include "base/hash.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <vector>

#include "base/error.h"
#include "base/headway.h"

namespace caldera {

Hasher::Hasher() : state_(XXH3_createState(), [](XXH3_state_t* state) { XXH3_freeState(state); }) {
  XXH3_128bits_reset(state_.get());
}

void Hasher::add(const void* bytes, size_t num_bytes) { XXH3_128bits_update(state_.get(), bytes, num_bytes); }

std::string Hasher::hex() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(state_.get());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

// Read piece by piece: a mapped checkpoint would count as memory of the training, as large as its file.
std::string hash_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  CALDERA_CHECK(file.is_open(), Error, "{}: cannot be read: {}", path.string(), std::strerror(errno));
  Hasher hasher;
  std::vector<char> piece(1 << 20);
  while (file.read(piece.data(), std::ssize(piece)) || file.gcount() > 0) {
    hasher.add(piece.data(), static_cast<size_t>(file.gcount()));
    note_headway();
  }
  CALDERA_CHECK(file.eof(), Error, "{}: cannot be read: {}", path.string(), std::strerror(errno));
  return hasher.hex();
}

}  // namespace caldera
