#include "base/gguf.h"

#include <bit>
#include <cstring>
#include <set>

#include "base/error.h"
#include "base/lfs_pointer.h"

namespace caldera {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF is read in place as little endian");

// Elements and bytes of one block, as ggml packs them.
struct TypeSize {
  uint32_t type;
  uint64_t block_elements, block_bytes;
};
constexpr TypeSize kTypeSizes[] = {
    {0, 1, 4},     {1, 1, 2},      {2, 32, 18},    {3, 32, 20},    {6, 32, 22},    {7, 32, 24},
    {8, 32, 34},   {10, 256, 84},  {11, 256, 110}, {12, 256, 144}, {13, 256, 176}, {14, 256, 210},
    {16, 256, 66}, {17, 256, 74},  {18, 256, 98},  {19, 256, 50},  {20, 32, 18},   {21, 256, 110},
    {22, 256, 82}, {23, 256, 136}, {24, 1, 1},     {25, 1, 2},     {26, 1, 4},     {27, 1, 8},
    {28, 1, 8},    {29, 256, 56},  {30, 1, 2},     {34, 256, 54},  {35, 256, 66},  {39, 32, 17}};

constexpr uint64_t kValueBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};  // at least

constexpr uint64_t kMaxAlignment = 1 << 20;

// Reads forward through the file; every length is checked before it is used.
class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, std::string file) : bytes_(bytes), file_(std::move(file)) {}

  uint64_t position() const { return position_; }
  uint64_t remaining() const { return bytes_.size() - position_; }

  template <class T>
  T number(const std::string& what) {
    require(sizeof(T), what);
    T value;
    std::memcpy(&value, bytes_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return value;
  }
  std::string string(const std::string& what) {
    const auto length = number<uint64_t>(what);
    require(length, what);
    std::string text(reinterpret_cast<const char*>(bytes_.data()) + position_, length);
    position_ += length;
    return text;
  }
  // A count of things of at least `min_bytes` each.
  uint64_t count(uint64_t value, uint64_t min_bytes, const std::string& what) const {
    CALDERA_CHECK(value <= remaining() / min_bytes, CheckpointError,
                  "{}: malformed GGUF: {} of {} does not fit the {} bytes that are left", file_, value, what,
                  remaining());
    return value;
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw CheckpointError(fmt::format("{}: malformed GGUF: {}", file_, what));
  }

 private:
  void require(uint64_t num_bytes, const std::string& what) const {
    CALDERA_CHECK(num_bytes <= remaining(), CheckpointError,
                  "{}: malformed GGUF: {} at byte {} takes {} bytes, {} are left; is the file truncated?",
                  file_, what, position_, num_bytes, remaining());
  }
  std::span<const std::byte> bytes_;
  std::string file_;
  uint64_t position_ = 0;
};

bool is_float(uint32_t type) { return type == kGgufF32 || type == kGgufF64; }

int64_t read_integer(Cursor& cursor, uint32_t type, const std::string& key) {
  switch (type) {
    case kGgufU8:
      return cursor.number<uint8_t>(key);
    case kGgufI8:
      return cursor.number<int8_t>(key);
    case kGgufU16:
      return cursor.number<uint16_t>(key);
    case kGgufI16:
      return cursor.number<int16_t>(key);
    case kGgufU32:
      return cursor.number<uint32_t>(key);
    case kGgufI32:
      return cursor.number<int32_t>(key);
    case kGgufI64:
      return cursor.number<int64_t>(key);
    default:
      break;
  }
  const auto value = cursor.number<uint64_t>(key);
  if (value > static_cast<uint64_t>(INT64_MAX)) cursor.fail(fmt::format("{}: {} is too large", key, value));
  return static_cast<int64_t>(value);
}

double read_float(Cursor& cursor, uint32_t type, const std::string& key) {
  return type == kGgufF32 ? static_cast<double>(cursor.number<float>(key)) : cursor.number<double>(key);
}

bool read_bool(Cursor& cursor, const std::string& key) {
  const auto value = cursor.number<uint8_t>(key);
  if (value > 1) cursor.fail(fmt::format("{}: a boolean of value {}", key, value));
  return value == 1;
}

GgufValue read_array(Cursor& cursor, const std::string& key) {
  const auto type = cursor.number<uint32_t>(key);
  if (type > kGgufF64) cursor.fail(fmt::format("{}: unknown value type {} in an array", key, type));
  if (type == kGgufArray) cursor.fail(fmt::format("{}: an array of arrays", key));
  const uint64_t size = cursor.count(cursor.number<uint64_t>(key), kValueBytes[type], key);
  const auto fill = [size](auto values, const auto& next) {
    values.reserve(size);
    for (uint64_t i = 0; i < size; ++i) values.push_back(next());
    return GgufValue(std::move(values));
  };
  if (type == kGgufString) return fill(std::vector<std::string>(), [&] { return cursor.string(key); });
  if (type == kGgufBool) return fill(std::vector<bool>(), [&] { return read_bool(cursor, key); });
  if (is_float(type)) return fill(std::vector<double>(), [&] { return read_float(cursor, type, key); });
  return fill(std::vector<int64_t>(), [&] { return read_integer(cursor, type, key); });
}

GgufValue read_value(Cursor& cursor, const std::string& key) {
  const auto type = cursor.number<uint32_t>(key);
  if (type > kGgufF64) cursor.fail(fmt::format("{}: unknown value type {}", key, type));
  if (type == kGgufArray) return read_array(cursor, key);
  if (type == kGgufString) return cursor.string(key);
  if (type == kGgufBool) return read_bool(cursor, key);
  if (is_float(type)) return read_float(cursor, type, key);
  return read_integer(cursor, type, key);
}

struct TensorEntry {
  GgufTensor tensor;
  uint64_t offset = 0, num_bytes = 0;
};

TensorEntry read_tensor_entry(Cursor& cursor) {
  TensorEntry entry;
  GgufTensor& tensor = entry.tensor;
  tensor.name = cursor.string("a tensor's name");
  const auto num_dims = cursor.number<uint32_t>(tensor.name);
  // ggml's own writer makes none without dimensions either.
  if (num_dims < 1 || num_dims > 4)
    cursor.fail(fmt::format("{}: expected 1 to 4 dimensions, got {}", tensor.name, num_dims));
  uint64_t num_elements = 1, row = 1;
  for (uint32_t i = 0; i < num_dims; ++i) {
    const auto size = cursor.number<uint64_t>(tensor.name);
    if (i == 0) row = size;
    // A dimension of zero would hide a product that overflows.
    if (size == 0 || size > static_cast<uint64_t>(INT64_MAX) ||
        num_elements > static_cast<uint64_t>(INT64_MAX) / size)
      cursor.fail(fmt::format("{}: dimension {} of size {} is out of range", tensor.name, i, size));
    num_elements *= size;
    tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(size));
  }
  tensor.type = cursor.number<uint32_t>(tensor.name);
  const auto* known = std::find_if(std::begin(kTypeSizes), std::end(kTypeSizes),
                                   [&](const TypeSize& t) { return t.type == tensor.type; });
  if (known == std::end(kTypeSizes))
    cursor.fail(fmt::format("{}: unknown tensor type {}", tensor.name, tensor.type));
  if (row % known->block_elements != 0)
    cursor.fail(fmt::format("{}: rows of {} elements are no multiple of the type's block of {}", tensor.name,
                            row, known->block_elements));
  const uint64_t num_blocks = num_elements / known->block_elements;
  if (num_blocks > UINT64_MAX / known->block_bytes)
    cursor.fail(fmt::format("{}: its size overflows", tensor.name));
  entry.num_bytes = num_blocks * known->block_bytes;
  entry.offset = cursor.number<uint64_t>(tensor.name);
  return entry;
}

template <class T>
const char* type_name() {
  if constexpr (std::is_same_v<T, int64_t>)
    return "integer";
  else if constexpr (std::is_same_v<T, double>)
    return "float";
  else if constexpr (std::is_same_v<T, bool>)
    return "boolean";
  else if constexpr (std::is_same_v<T, std::string>)
    return "string";
  else if constexpr (std::is_same_v<T, std::vector<int64_t>>)
    return "array of integers";
  else if constexpr (std::is_same_v<T, std::vector<double>>)
    return "array of floats";
  else if constexpr (std::is_same_v<T, std::vector<bool>>)
    return "array of booleans";
  else
    return "array of strings";
}

uint64_t read_alignment(const std::map<std::string, GgufValue>& metadata, const Cursor& cursor) {
  const auto found = metadata.find("general.alignment");
  if (found == metadata.end()) return 32;
  const auto* value = std::get_if<int64_t>(&found->second);
  if (value == nullptr || *value < 1 || !std::has_single_bit(static_cast<uint64_t>(*value)) ||
      static_cast<uint64_t>(*value) > kMaxAlignment)
    cursor.fail("general.alignment is no power of two up to 1048576");
  return static_cast<uint64_t>(*value);
}

}  // namespace

GgufFile::GgufFile(const std::filesystem::path& path) : map_(path) {
  refuse_lfs_pointer(map_.bytes(), path.string());
  Cursor cursor(map_.bytes(), path.string());
  if (map_.bytes().size() < 4 || std::memcmp(map_.bytes().data(), "GGUF", 4) != 0)
    throw CheckpointError(fmt::format("{}: not a GGUF file: it does not begin with \"GGUF\"", path.string()));
  cursor.number<uint32_t>("magic");
  const auto version = cursor.number<uint32_t>("version");
  if (version != 2 && version != 3)
    cursor.fail(fmt::format("version {}; 2 and 3 (little endian) are known", version));
  const auto num_tensors = cursor.number<uint64_t>("number of tensors");
  const auto num_values = cursor.number<uint64_t>("number of metadata values");
  cursor.count(num_values, 8 + 4 + 1, "number of metadata values");
  for (uint64_t i = 0; i < num_values; ++i) {
    std::string key = cursor.string("a metadata key");
    GgufValue value = read_value(cursor, key);
    if (!metadata_.emplace(key, std::move(value)).second)
      cursor.fail(fmt::format("metadata key {} occurs twice", key));
  }
  const uint64_t alignment = read_alignment(metadata_, cursor);
  const auto padded = [alignment](uint64_t n) { return (n + alignment - 1) / alignment * alignment; };

  cursor.count(num_tensors, 8 + 4 + 4 + 8, "number of tensors");
  std::vector<TensorEntry> entries;
  entries.reserve(num_tensors);
  std::set<std::string_view> names;
  for (uint64_t i = 0; i < num_tensors; ++i) entries.push_back(read_tensor_entry(cursor));

  if (entries.empty()) return;
  const uint64_t data_begin = padded(cursor.position());
  if (data_begin > map_.bytes().size()) cursor.fail("the tensors' data begin beyond the file's end");
  const std::span<const std::byte> data = map_.bytes().subspan(data_begin);
  uint64_t expected_offset = 0;  // the tensors lie one behind another, as ggml demands: none overlaps
  for (TensorEntry& entry : entries) {
    GgufTensor& tensor = entry.tensor;
    if (!names.insert(tensor.name).second) cursor.fail(fmt::format("tensor {} occurs twice", tensor.name));
    if (entry.offset != expected_offset)
      cursor.fail(fmt::format("{}: expected offset {}, got {}", tensor.name, expected_offset, entry.offset));
    if (entry.offset > data.size() || entry.num_bytes > data.size() - entry.offset)
      cursor.fail(
          fmt::format("{}: {} bytes at offset {} reach beyond the {} bytes of data; is the file truncated?",
                      tensor.name, entry.num_bytes, entry.offset, data.size()));
    tensor.bytes = data.subspan(entry.offset, entry.num_bytes);
    expected_offset = padded(entry.offset + entry.num_bytes);
  }
  tensors_.reserve(entries.size());
  for (TensorEntry& entry : entries) tensors_.push_back(std::move(entry.tensor));
}

template <class T>
const T& GgufFile::get(const std::string& key) const {
  const auto found = metadata_.find(key);
  CALDERA_CHECK(found != metadata_.end(), CheckpointError, "{}: no metadata key {}", path().string(), key);
  const T* value = std::get_if<T>(&found->second);
  if (value == nullptr) {
    const char* got = std::visit([]<class U>(const U&) { return type_name<U>(); }, found->second);
    throw CheckpointError(
        fmt::format("{}: {}: expected {}, got {}", path().string(), key, type_name<T>(), got));
  }
  return *value;
}

template const int64_t& GgufFile::get(const std::string&) const;
template const double& GgufFile::get(const std::string&) const;
template const bool& GgufFile::get(const std::string&) const;
template const std::string& GgufFile::get(const std::string&) const;
template const std::vector<int64_t>& GgufFile::get(const std::string&) const;
template const std::vector<double>& GgufFile::get(const std::string&) const;
template const std::vector<bool>& GgufFile::get(const std::string&) const;
template const std::vector<std::string>& GgufFile::get(const std::string&) const;

}  // namespace caldera
