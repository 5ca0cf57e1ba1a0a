// The weights of a folder, in whichever of HF's four layouts.
#include "base/error.h"
#include "model/weights/json_fields.h"
#include "model/weights/safetensors.h"
#include "model/weights/torch_pickle.h"

namespace caldera {
namespace {

// Several files behind one index.
class ShardedWeights : public TensorSource {
 public:
  explicit ShardedWeights(const fs::path& index) : index_(index) {
    const Json json = read_config(index);
    CALDERA_CHECK(json.is_object() && json.contains("weight_map") && json["weight_map"].is_object(),
                  CheckpointError, "{}: expected an object with a \"weight_map\"", index.string());
    for (const auto& [name, file] : json["weight_map"].items()) {
      CALDERA_CHECK(file.is_string(), CheckpointError, "{}: weight_map: {}: expected a file name",
                    index.string(), name);
      const std::string file_name = file.get<std::string>();
      // A shard lies beside its index: a name that leads elsewhere is refused.
      CALDERA_CHECK(!file_name.empty() && fs::path(file_name).filename() == file_name && file_name != ".." &&
                        file_name != "." && file_name.find('\0') == std::string::npos,
                    CheckpointError, "{}: weight_map: {}: \"{}\" is not a plain file name", index.string(),
                    name, file_name);
      std::unique_ptr<TensorSource>& shard = shards_[file_name];
      if (shard == nullptr) shard = open_weights_file(index.parent_path() / file_name);
      CALDERA_CHECK(shard->has(name), CheckpointError, "{}: tensor {} is not in {}", index.string(), name,
                    file_name);
      tensors_[name] = shard.get();
    }
  }
  std::vector<std::string> names() const override {
    std::vector<std::string> result;
    for (const auto& [name, shard] : tensors_) result.push_back(name);
    return result;
  }
  bool has(const std::string& name) const override { return tensors_.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const override { return shard(name).shape(name); }
  at::Tensor read(const std::string& name) const override { return shard(name).read(name); }
  std::string where(const std::string& name) const override {
    return has(name) ? shard(name).where(name) : index_.string();
  }

 private:
  const TensorSource& shard(const std::string& name) const {
    const auto found = tensors_.find(name);
    CALDERA_CHECK(found != tensors_.end(), CheckpointError, "{}: no tensor {}", index_.string(), name);
    return *found->second;
  }
  fs::path index_;
  std::map<std::string, std::unique_ptr<TensorSource>> shards_;
  std::map<std::string, const TensorSource*> tensors_;
};

// In the order in which they are looked for: safetensors first.
constexpr const char* kSingleFiles[] = {"model.safetensors", "pytorch_model.bin"};
constexpr const char* kIndexFiles[] = {"model.safetensors.index.json", "pytorch_model.bin.index.json"};

}  // namespace

std::unique_ptr<TensorSource> open_weights_file(const fs::path& file) {
  return file.extension() == ".safetensors" ? open_safetensors(file) : open_torch_pickle(file);
}

bool has_weights(const fs::path& folder) {
  for (const auto& files : {kSingleFiles, kIndexFiles})
    for (size_t i = 0; i < 2; ++i)
      if (fs::exists(folder / files[i])) return true;
  return false;
}

std::unique_ptr<TensorSource> open_weights_folder(const fs::path& folder) {
  for (size_t i = 0; i < 2; ++i) {
    if (fs::exists(folder / kSingleFiles[i])) return open_weights_file(folder / kSingleFiles[i]);
    if (fs::exists(folder / kIndexFiles[i])) return std::make_unique<ShardedWeights>(folder / kIndexFiles[i]);
  }
  throw CheckpointError(fmt::format("{}: holds neither {} nor {}, nor an index of either's shards ({}, {})",
                                    folder.string(), kSingleFiles[0], kSingleFiles[1], kIndexFiles[0],
                                    kIndexFiles[1]));
}

}  // namespace caldera
