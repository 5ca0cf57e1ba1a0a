// safetensors files: read through a memory map, written atomically as a stream.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/aten.h"
#include "base/files.h"
#include "base/json.h"

namespace caldera {

// A source of named tensors: one safetensors file, a sharded folder, a GGUF file, ... Reading is lazy.
class TensorSource {
 public:
  virtual ~TensorSource() = default;
  virtual std::vector<std::string> names() const = 0;
  virtual bool has(const std::string& name) const = 0;
  virtual std::vector<int64_t> shape(const std::string& name) const = 0;
  // CPU tensor in the file's dtype (quantised types: float32). May share the map's memory: copy, never write.
  virtual at::Tensor read(const std::string& name) const = 0;
  virtual std::string where(const std::string& name) const = 0;  // file, for messages
};

// One .safetensors file. Checks the whole header on opening: throws CheckpointError with file, tensor,
// expected and got. Refuses besides what the reference refuses: a header beginning with white space, a
// duplicate name, NUL in a name, and the types below one byte, which torch cannot hold.
std::unique_ptr<TensorSource> open_safetensors(const std::filesystem::path& file);
// One file of weights: safetensors where its name says so, else what torch.save wrote (torch_pickle.h).
std::unique_ptr<TensorSource> open_weights_file(const std::filesystem::path& file);
// A folder: model.safetensors, or model.safetensors.index.json with its shards, or the same of
// pytorch_model.bin.
std::unique_ptr<TensorSource> open_weights_folder(const std::filesystem::path& folder);
// True where open_weights_folder would find weights.
bool has_weights(const std::filesystem::path& folder);
// The files that open_weights_folder reads, the index apart; empty where has_weights() is false.
std::vector<std::filesystem::path> weights_files(const std::filesystem::path& folder);
// A folder without has_weights() may still hold somebody's weights, under names that are not read: shards
// without their index, consolidated.safetensors, a projector alone, ... Throws CheckpointError naming them,
// and what to do.
void refuse_unread_weights(const std::filesystem::path& folder);
// The "__metadata__" object of one file.
std::map<std::string, std::string> safetensors_metadata(const std::filesystem::path& file);

using TensorList = std::vector<std::pair<std::string, at::Tensor>>;

// A tensor that is read, once, when its turn comes to be written.
struct TensorToWrite {
  std::string name;
  std::vector<int64_t> shape;
  at::ScalarType type;
  std::function<at::Tensor()> read;
};

// How long a file became, and its XXH3-128.
struct WrittenFile {
  uint64_t num_bytes;
  std::string hash;
};
// Writes one file, atomically: header first, then each tensor's bytes (made contiguous, moved to CPU and,
// where a dtype is given, floats converted to it, one at a time, so memory stays flat).
WrittenFile write_safetensors(const std::filesystem::path& file, const std::vector<TensorToWrite>& tensors,
                              const std::map<std::string, std::string>& metadata = {{"format", "pt"}},
                              std::optional<at::ScalarType> dtype = {});
void write_safetensors(const std::filesystem::path& file, const TensorList& tensors,
                       const std::map<std::string, std::string>& metadata = {{"format", "pt"}},
                       std::optional<at::ScalarType> dtype = {});
// HF's sharded layout: one model.safetensors, or model-0000i-of-0000n.safetensors with an index above
// max_shard_bytes.
void write_weights_folder(const std::filesystem::path& folder, const TensorList& tensors,
                          int64_t max_shard_bytes = 5'000'000'000, std::optional<at::ScalarType> dtype = {});

}  // namespace caldera
