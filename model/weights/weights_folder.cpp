// The weights of a folder, in whichever of HF's four layouts.
#include <algorithm>
#include <set>

#include "base/error.h"
#include "base/strings.h"
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

// What a training leaves beside a model's weights, and is none.
bool is_training_state(const std::string& name) {
  for (const char* start :
       {"training_args", "optimizer", "scheduler", "rng_state", "random_states", "scaler"})
    if (name.starts_with(start)) return true;
  return false;
}

std::vector<std::string> unread_weights(const fs::path& folder) {
  std::vector<std::string> names;
  if (!fs::is_directory(folder)) return names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string(), extension = entry.path().extension().string();
    for (const char* known :
         {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz"})
      if (extension == known && !is_training_state(name)) names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

// What those names tell of how they came there.
std::string advice_for(const std::vector<std::string>& names) {
  const auto any = [&names](const auto& is_such) { return std::any_of(names.begin(), names.end(), is_such); };
  if (any([](const std::string& name) { return name.find("-of-") != std::string::npos; }))
    return "shards without their index: get model.safetensors.index.json (or pytorch_model.bin.index.json) "
           "and all "
           "shards that it names";
  if (any([](const std::string& name) { return name.starts_with("consolidated"); }))
    return "this is the format of the model's makers: get the folder's model*.safetensors with their index";
  if (any([](const std::string& name) { return name.starts_with("adapter_model"); }))
    return "an adapter, not a model: name the model that it was trained on, or export the two merged";
  if (any([](const std::string& name) {
        return name == "mm_projector.bin" || name == "non_lora_trainables.bin";
      }))
    return "a folder of the original LLaVA without its decoder (stage 1 leaves the projector alone): name "
           "the decoder "
           "that it was trained on, and this folder as model.pretrain_mm_mlp_adapter";
  if (any([](const std::string& name) { return name.ends_with(".gguf"); }))
    return "name the .gguf file itself";
  return "rename them so, or remove what is none of this model's";
}

}  // namespace

std::unique_ptr<TensorSource> open_weights_file(const fs::path& file) {
  return file.extension() == ".safetensors" ? open_safetensors(file) : open_torch_pickle(file);
}

void refuse_unread_weights(const fs::path& folder) {
  const std::vector<std::string> names = unread_weights(folder);
  if (names.empty()) return;
  const std::vector<std::string> first(names.begin(),
                                       names.begin() + std::min<ptrdiff_t>(3, std::ssize(names)));
  throw CheckpointError(
      fmt::format("{}: holds {}{}, but nothing named {}, {} or their indices, which are read; {}",
                  folder.string(), join(first, ", "), names.size() > 3 ? ", ..." : "", kSingleFiles[0],
                  kSingleFiles[1], advice_for(names)));
}

std::vector<fs::path> weights_files(const fs::path& folder) {
  for (size_t i = 0; i < 2; ++i) {
    if (fs::exists(folder / kSingleFiles[i])) return {folder / kSingleFiles[i]};
    if (!fs::exists(folder / kIndexFiles[i])) continue;
    const Json index = read_config(folder / kIndexFiles[i]);
    std::set<fs::path> files;
    for (const Json& file : index.value("weight_map", Json::object()))
      if (file.is_string()) files.insert(folder / file.get<std::string>());
    return {files.begin(), files.end()};
  }
  return {};
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
  refuse_unread_weights(folder);
  throw CheckpointError(fmt::format("{}: holds neither {} nor {}, nor an index of either's shards ({}, {})",
                                    folder.string(), kSingleFiles[0], kSingleFiles[1], kIndexFiles[0],
                                    kIndexFiles[1]));
}

}  // namespace caldera
