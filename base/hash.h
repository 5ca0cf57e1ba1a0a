// Checksums of what we write, so that bit rot is found before it is used.
#pragma once
#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>

struct XXH3_state_s;

namespace caldera {

// XXH3-128 of bytes that come one after the other.
class Hasher {
 public:
  Hasher();
  void add(const void* bytes, size_t num_bytes);
  std::string hex() const;  // of what came so far: 32 digits

 private:
  std::unique_ptr<XXH3_state_s, void (*)(XXH3_state_s*)> state_;
};

// XXH3-128 of a file's bytes, as 32 hex digits. Throws Error naming the file.
std::string hash_file(const std::filesystem::path& path);

}  // namespace caldera
