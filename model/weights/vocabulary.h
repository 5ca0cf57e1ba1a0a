// Export pads the vocabulary where the image placeholder's id lies beyond it; reading takes the padding off
// again, so that no softmax runs over rows that were never trained.
#pragma once
#include <string>
#include <vector>

#include "model/weights/safetensors.h"

namespace caldera {

// Shows the vocabulary's matrices without the rows that an export added.
class UnpaddedVocabulary : public TensorSource {
 public:
  UnpaddedVocabulary(const TensorSource& source, int64_t vocab_size)
      : source_(source), vocab_size_(vocab_size) {}
  std::vector<std::string> names() const override { return source_.names(); }
  bool has(const std::string& name) const override { return source_.has(name); }
  std::vector<int64_t> shape(const std::string& name) const override {
    std::vector<int64_t> shape = source_.shape(name);
    if (is_padded(name, shape)) shape[0] = vocab_size_;
    return shape;
  }
  at::Tensor read(const std::string& name) const override {
    const at::Tensor tensor = source_.read(name);
    return is_padded(name, tensor.sizes()) ? tensor.narrow(0, 0, vocab_size_) : tensor;
  }
  std::string where(const std::string& name) const override { return source_.where(name); }

 private:
  bool is_padded(const std::string& name, at::IntArrayRef shape) const {
    const bool is_vocabulary = name.ends_with("embed_tokens.weight") || name.ends_with("lm_head.weight");
    return vocab_size_ > 0 && is_vocabulary && !shape.empty() && shape[0] > vocab_size_;
  }
  const TensorSource& source_;
  int64_t vocab_size_;
};

}  // namespace caldera
