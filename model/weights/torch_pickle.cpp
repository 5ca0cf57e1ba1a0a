#include "model/weights/torch_pickle.h"

#include <cstring>

#include "base/error.h"
#include "base/lfs_pointer.h"
#include "model/weights/pickle.h"
#include "model/weights/zip.h"

namespace caldera {
namespace {

constexpr uint64_t kMaxPickleBytes = 20'000'000;  // real ones take some 100 kB

class TorchPickle : public TensorSource {
 public:
  explicit TorchPickle(const fs::path& file) : map_(std::make_shared<MappedFile>(file)) {
    const std::string where = file.string();
    const std::span<const std::byte> bytes = map_->bytes();
    const std::map<std::string, ZipMember> members = read_zip(bytes, where);
    const std::string root = root_of(members, where);
    CALDERA_CHECK(!members.contains(root + "constants.pkl"), CheckpointError,
                  "{}: a TorchScript program, not weights; save its state_dict() with torch", where);
    if (const auto order = members.find(root + "byteorder"); order != members.end())
      CALDERA_CHECK(view(order->second) == "little", CheckpointError, "{}: its numbers are big-endian",
                    where);
    const ZipMember pickle = members.at(root + "data.pkl");
    CALDERA_CHECK(pickle.size <= kMaxPickleBytes, CheckpointError,
                  "{}: a pickle of {} bytes; at most {} are allowed", where, pickle.size, kMaxPickleBytes);
    tensors_ = read_tensor_pickle(bytes.subspan(pickle.begin, pickle.size), where);
    for (const auto& [name, tensor] : tensors_) {
      const auto member = members.find(root + "data/" + tensor.storage);
      CALDERA_CHECK(member != members.end(), CheckpointError, "{}: {}: its storage data/{} is missing", where,
                    name, tensor.storage);
      const uint64_t element_bytes = c10::elementSize(tensor.type);
      CALDERA_CHECK(member->second.size % element_bytes == 0 &&
                        member->second.size / element_bytes == static_cast<uint64_t>(tensor.storage_elements),
                    CheckpointError, "{}: {}: expected a storage of {} elements of {} bytes, got {} bytes",
                    where, name, tensor.storage_elements, element_bytes, member->second.size);
      begins_[tensor.storage] = member->second.begin;
    }
  }

  std::vector<std::string> names() const override {
    std::vector<std::string> result;
    for (const auto& [name, tensor] : tensors_) result.push_back(name);
    return result;
  }
  bool has(const std::string& name) const override { return tensors_.contains(name); }
  std::vector<int64_t> shape(const std::string& name) const override { return tensor(name).shape; }
  std::string where(const std::string&) const override { return map_->path().string(); }

  at::Tensor read(const std::string& name) const override {
    const PickledTensor& found = tensor(name);
    const auto options = at::TensorOptions().dtype(found.type);
    const auto num_elements = c10::multiply_integers(found.shape);
    if (num_elements == 0) return at::empty(found.shape, options);
    int64_t reach = 1;  // elements from its first to its last, both included
    for (size_t i = 0; i < found.shape.size(); ++i) reach += (found.shape[i] - 1) * found.strides[i];
    const size_t element_bytes = c10::elementSize(found.type);
    const std::byte* data =
        map_->bytes().data() + begins_.at(found.storage) + static_cast<size_t>(found.offset) * element_bytes;
    if (reinterpret_cast<uintptr_t>(data) % element_bytes != 0) {  // torch's kernels want it aligned
      at::Tensor copy = at::empty({reach}, options);
      std::memcpy(copy.data_ptr(), data, static_cast<size_t>(reach) * element_bytes);
      return copy.as_strided(found.shape, found.strides);
    }
    return at::from_blob(
        const_cast<std::byte*>(data), found.shape, found.strides, [map = map_](void*) {}, options);
  }

 private:
  // torch.save puts everything into one folder, named as it likes.
  static std::string root_of(const std::map<std::string, ZipMember>& members, const std::string& where) {
    constexpr std::string_view kPickle = "/data.pkl";
    for (const auto& [name, member] : members)
      if (name.ends_with(kPickle) && name.find('/') == name.size() - kPickle.size())
        return name.substr(0, name.size() - kPickle.size() + 1);
    throw CheckpointError(
        fmt::format("{}: a zip archive without data.pkl: not written by torch.save", where));
  }
  std::string_view view(const ZipMember& member) const {
    return {reinterpret_cast<const char*>(map_->bytes().data()) + member.begin, member.size};
  }
  const PickledTensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    CALDERA_CHECK(found != tensors_.end(), CheckpointError, "{}: no tensor {}", map_->path().string(), name);
    return found->second;
  }

  std::shared_ptr<MappedFile> map_;
  std::map<std::string, PickledTensor> tensors_;
  std::map<std::string, uint64_t> begins_;  // of each storage's data
};

}  // namespace

std::unique_ptr<TensorSource> open_torch_pickle(const fs::path& file) {
  CALDERA_CHECK(fs::is_regular_file(file), CheckpointError, "{}: no such file", file.string());
  {
    const MappedFile map(file);
    const std::span<const std::byte> bytes = map.bytes();
    refuse_lfs_pointer(bytes, file.string());
    const std::string_view start(reinterpret_cast<const char*>(bytes.data()),
                                 std::min<size_t>(bytes.size(), 16));
    CALDERA_CHECK(
        !start.starts_with("\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"), CheckpointError,
        "{}: written in the format of PyTorch before 1.6, which is not read; load it with torch and save it "
        "again",
        file.string());
    CALDERA_CHECK(start.starts_with("PK"), CheckpointError,
                  "{}: not a file of torch.save: expected a zip archive; is it truncated?", file.string());
  }
  return std::make_unique<TorchPickle>(file);
}

}  // namespace caldera
