// PyTorch's file: a zip archive of stored members, "NAME/data.pkl" (a pickle of protocol 2 that refers to
// storages) and a member "NAME/data/KEY" for each storage. (torch/serialization.py,
// caffe2/serialize/inline_container.cc)
#include "model/weights/torch_pickle_write.h"

#include <array>
#include <cstring>

#include "base/error.h"

namespace caldera {
namespace {

constexpr uint64_t kAlignment = 64;         // of storages in the file, as PyTorch has them
constexpr uint16_t kPaddingField = 0x4246;  // PyTorch's extra field "FB", which only takes space
constexpr uint64_t kMaxBytes = 0xFFFF'0000;

uint32_t crc32(std::string_view bytes, uint32_t crc = 0) {
  static const std::array<uint32_t, 256> table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value & 1 ? 0xEDB88320u ^ (value >> 1) : value >> 1;
      t[i] = value;
    }
    return t;
  }();
  crc = ~crc;
  for (const char c : bytes) crc = table[(crc ^ static_cast<uint8_t>(c)) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

template <class T>
void put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

// Stored members one after another; the table of contents last.
class ZipWriter {
 public:
  explicit ZipWriter(const fs::path& file) : out_(file), file_(file.string()) {}

  void add(const std::string& name, std::string_view data) {
    const uint64_t offset = position_, header = 30 + name.size();
    CALDERA_CHECK(offset + data.size() < kMaxBytes, Error,
                  "{}: would hold more than 4 GB; write safetensors instead", file_);
    // The padding field has 4 bytes of its own.
    const uint64_t padding = (kAlignment - (offset + header + 4) % kAlignment) % kAlignment;
    Entry entry = {name, crc32(data), static_cast<uint32_t>(data.size()), static_cast<uint32_t>(offset)};
    std::string local;
    put<uint32_t>(local, 0x04034b50);
    describe(local, entry, static_cast<uint16_t>(4 + padding));
    local += name;
    put<uint16_t>(local, kPaddingField);
    put<uint16_t>(local, static_cast<uint16_t>(padding));
    local.append(padding, 'Z');
    write(local);
    write(data);
    entries_.push_back(std::move(entry));
  }

  void commit() {
    const auto begin = static_cast<uint32_t>(position_);
    std::string directory;
    for (const Entry& entry : entries_) {
      put<uint32_t>(directory, 0x02014b50);
      put<uint16_t>(directory, 0);  // made by
      describe(directory, entry, 0);
      put<uint16_t>(directory, 0);  // comment
      put<uint16_t>(directory, 0);  // disk
      put<uint16_t>(directory, 0);  // attributes
      put<uint32_t>(directory, 0);
      put<uint32_t>(directory, entry.offset);
      directory += entry.name;
    }
    const auto size = static_cast<uint32_t>(directory.size());
    put<uint32_t>(directory, 0x06054b50);
    put<uint32_t>(directory, 0);  // disks
    put<uint16_t>(directory, static_cast<uint16_t>(entries_.size()));
    put<uint16_t>(directory, static_cast<uint16_t>(entries_.size()));
    put<uint32_t>(directory, size);
    put<uint32_t>(directory, begin);
    put<uint16_t>(directory, 0);
    write(directory);
    out_.commit();
  }

 private:
  struct Entry {
    std::string name;
    uint32_t crc = 0, size = 0, offset = 0;
  };
  // What both records of a member say alike.
  static void describe(std::string& out, const Entry& entry, uint16_t extra) {
    put<uint16_t>(out, 20);  // version needed
    put<uint16_t>(out, 0);   // flags
    put<uint16_t>(out, 0);   // stored
    put<uint32_t>(out, 0);   // time and date
    put<uint32_t>(out, entry.crc);
    put<uint32_t>(out, entry.size);
    put<uint32_t>(out, entry.size);
    put<uint16_t>(out, static_cast<uint16_t>(entry.name.size()));
    put<uint16_t>(out, extra);
  }
  void write(std::string_view bytes) {
    out_.write(bytes);
    position_ += bytes.size();
  }
  AtomicFile out_;
  std::string file_;
  uint64_t position_ = 0;
  std::vector<Entry> entries_;
};

const char* storage_class(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "FloatStorage";
    case at::kHalf:
      return "HalfStorage";
    case at::kBFloat16:
      return "BFloat16Storage";
    case at::kLong:
      return "LongStorage";
    default:
      throw Error(fmt::format("torch pickles are not written with tensors of type {}", c10::toString(type)));
  }
}

// The pickle's instructions (Python's pickletools names them).
class Pickle {
 public:
  Pickle() : text_("\x80\x02}(") {}  // PROTO 2, EMPTY_DICT, MARK
  void add(const std::string& name, const std::string& key, const at::Tensor& tensor) {
    string(name);
    global("torch._utils", "_rebuild_tensor_v2");
    text_ += "((";  // MARK: its arguments; MARK: the persistent id
    string("storage");
    global("torch", storage_class(tensor.scalar_type()));
    string(key);
    string("cpu");
    integer(tensor.numel());
    text_ += "tQ";  // TUPLE, BINPERSID
    integer(0);     // offset
    tuple(tensor.sizes());
    tuple(tensor.strides());
    text_ += '\x89';  // NEWFALSE: requires_grad
    global("collections", "OrderedDict");
    text_ += ")RtR";  // EMPTY_TUPLE, REDUCE: no hooks; TUPLE, REDUCE: the tensor
  }
  std::string finish() { return text_ + "u."; }  // SETITEMS, STOP

 private:
  void string(const std::string& value) {
    text_ += 'X';  // BINUNICODE
    put<uint32_t>(text_, static_cast<uint32_t>(value.size()));
    text_ += value;
  }
  void global(const char* module, const char* name) { text_ += fmt::format("c{}\n{}\n", module, name); }
  void integer(int64_t value) {
    if (value < 0x7FFF'FFFF) {
      text_ += 'J';  // BININT
      put<int32_t>(text_, static_cast<int32_t>(value));
    } else {
      text_ += "\x8a\x08";  // LONG1 of 8 bytes
      put<int64_t>(text_, value);
    }
  }
  void tuple(at::IntArrayRef values) {
    text_ += '(';
    for (const int64_t value : values) integer(value);
    text_ += 't';
  }
  std::string text_;
};

}  // namespace

void write_torch_pickle(const fs::path& file, const TensorList& tensors,
                        std::optional<at::ScalarType> dtype) {
  const auto stored = [&dtype](const at::Tensor& tensor) {
    const at::Tensor host = tensor.detach().to(at::kCPU);
    return (dtype && host.is_floating_point() ? host.to(*dtype) : host).contiguous();
  };
  Pickle pickle;
  for (size_t i = 0; i < tensors.size(); ++i)
    pickle.add(tensors[i].first, std::to_string(i), stored(tensors[i].second));
  const std::string root = file.stem().string() + "/";
  ZipWriter zip(file);
  zip.add(root + "data.pkl", pickle.finish());
  zip.add(root + "byteorder", "little");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor bytes = stored(tensors[i].second);
    zip.add(root + "data/" + std::to_string(i),
            std::string_view(static_cast<const char*>(bytes.const_data_ptr()), bytes.nbytes()));
  }
  zip.add(root + "version", "3\n");
  zip.commit();
}

}  // namespace caldera
