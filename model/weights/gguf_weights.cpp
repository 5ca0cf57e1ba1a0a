#include "model/weights/gguf_weights.h"

#include "base/error.h"
#include "base/strings.h"
#include "model/weights/gguf_config.h"
#include "model/weights/gguf_names.h"

namespace caldera {
namespace {

class GgufWeights : public TensorSource {
 public:
  // Heads of q and k whose rows llama.cpp has in its own order; 0 where it keeps HF's.
  GgufWeights(std::shared_ptr<GgufFile> file, const std::function<std::string(const std::string&)>& hf_name,
              int64_t num_heads = 0, int64_t num_key_value_heads = 0)
      : file_(std::move(file)), num_heads_(num_heads), num_key_value_heads_(num_key_value_heads) {
    for (const GgufTensor& tensor : file_->tensors()) {
      if (tensor.name == kGgufRopeDivisors) continue;  // they are in the configuration
      const std::string name = hf_name(tensor.name);
      CALDERA_CHECK(!name.empty(), CheckpointError, "{}: tensor {} has no place in architecture {}",
                    file_->path().string(), tensor.name, file_->get<std::string>("general.architecture"));
      tensors_[name] = &tensor;
    }
  }
  std::vector<std::string> names() const override {
    std::vector<std::string> result;
    for (const auto& [name, tensor] : tensors_) result.push_back(name);
    return result;
  }
  bool has(const std::string& name) const override { return tensors_.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const override { return tensor(name).shape; }
  std::string where(const std::string&) const override { return file_->path().string(); }
  at::Tensor read(const std::string& name) const override {
    const at::Tensor values = dequantize(tensor(name), file_->path().string());
    if (num_heads_ == 0) return values;
    if (name.find(".q_proj.") != std::string::npos) return from_neighbour_order(values, num_heads_);
    if (name.find(".k_proj.") != std::string::npos) return from_neighbour_order(values, num_key_value_heads_);
    return values;
  }

 private:
  const GgufTensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    CALDERA_CHECK(found != tensors_.end(), CheckpointError, "{}: no tensor for {}", file_->path().string(),
                  name);
    return *found->second;
  }
  std::shared_ptr<GgufFile> file_;
  int64_t num_heads_, num_key_value_heads_;
  std::map<std::string, const GgufTensor*> tensors_;
};

}  // namespace

std::unique_ptr<TensorSource> open_gguf_tensors(
    std::shared_ptr<GgufFile> file, const std::function<std::string(const std::string&)>& hf_name) {
  return std::make_unique<GgufWeights>(std::move(file), hf_name);
}

GgufDecoder open_gguf_decoder(const fs::path& path) {
  auto file = std::make_shared<GgufFile>(path);
  refuse_gguf_part(*file);
  GgufDecoder decoder;
  decoder.architecture = file->get<std::string>("general.architecture");
  std::vector<std::string> known;
  const GgufArchitecture* architecture = nullptr;
  for (const GgufArchitecture& candidate : gguf_architectures()) {
    known.emplace_back(candidate.name);
    if (decoder.architecture == candidate.name) architecture = &candidate;
  }
  CALDERA_CHECK(architecture != nullptr, CheckpointError,
                "{}: general.architecture: expected one of {}, got {}", path.string(), join(known, ", "),
                decoder.architecture);
  decoder.config = gguf_decoder_config(*file, *architecture);
  const auto heads = [&](const char* key) {
    return architecture->rotates_neighbours ? decoder.config[key].get<int64_t>() : 0;
  };
  decoder.weights =
      std::make_unique<GgufWeights>(file, hf_decoder_name, heads("num_attention_heads"), heads("num_key_value_heads"));
  return decoder;
}

}  // namespace caldera
