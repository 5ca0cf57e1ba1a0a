// The table of contents of a zip archive whose members are stored, not compressed (as torch.save writes it).
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>

namespace caldera {

struct ZipMember {
  uint64_t begin = 0, size = 0;  // bytes of its data in the file
};

// Names and places of the members, zip64 included. Every offset is held against the file's size. Throws
// CheckpointError for what is no such archive: compressed or encrypted members, names that occur twice or
// differ between the two places that state them, data that overlap or reach beyond the file.
std::map<std::string, ZipMember> read_zip(std::span<const std::byte> bytes, const std::string& file);

}  // namespace caldera
