// The instructions are those of Python's pickletools; the calls, those of torch/_utils.py and
// torch/serialization.py.
#include "model/weights/pickle.h"

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <string_view>
#include <unordered_map>

#include "base/error.h"

namespace caldera {
namespace {

// What the values may take in memory, a byte of the pickle: in a dictionary of tensors they take some 17,
// while a file made to fill the memory asks for a hundred and more. The part that does not depend on the size
// lets the smallest files pass.
constexpr uint64_t kMemoryPerByte = 40, kMemoryOfAny = 1 << 16;
constexpr uint64_t kMemoBytes = 48;                        // a node of the map of what is stored
constexpr size_t kMaxDimensions = 16, kMaxKeyBytes = 255;  // real ones: up to five, and a decimal number

struct Value {
  enum class Kind { kNone, kBool, kInt, kFloat, kText, kTuple, kList, kDict, kName, kStorage, kTensor };
  Kind kind = Kind::kNone;
  int64_t integer = 0;                    // kBool, kInt
  std::string_view text;                  // kText (in the pickle), kName ("module name", a constant)
  std::vector<const Value*> items;        // kTuple, kList; kDict: keys and values in turn
  std::unique_ptr<PickledTensor> tensor;  // kTensor; kStorage: its first three members
};
using Kind = Value::Kind;

const char* describe(const Value& value) {
  switch (value.kind) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return "a bool";
    case Kind::kInt:
      return "an integer";
    case Kind::kFloat:
      return "a float";
    case Kind::kText:
      return "a text";
    case Kind::kTuple:
      return "a tuple";
    case Kind::kList:
      return "a list";
    case Kind::kDict:
      return "a dictionary";
    case Kind::kName:
      return "a class or function";
    case Kind::kStorage:
      return "a storage";
    case Kind::kTensor:
      return "a tensor";
  }
  return "";
}

constexpr std::pair<std::string_view, at::ScalarType> kStorageTypes[] = {
    {"torch FloatStorage", at::kFloat},       {"torch HalfStorage", at::kHalf},
    {"torch BFloat16Storage", at::kBFloat16}, {"torch DoubleStorage", at::kDouble},
    {"torch LongStorage", at::kLong},         {"torch IntStorage", at::kInt},
    {"torch ShortStorage", at::kShort},       {"torch CharStorage", at::kChar},
    {"torch ByteStorage", at::kByte},         {"torch BoolStorage", at::kBool}};

std::optional<at::ScalarType> storage_type(std::string_view name) {
  for (const auto& [known, type] : kStorageTypes)
    if (known == name) return type;
  return {};
}

constexpr std::string_view kOrderedDict = "collections OrderedDict";
constexpr std::string_view kRebuildTensor = "torch._utils _rebuild_tensor_v2";
constexpr std::string_view kRebuildParameter = "torch._utils _rebuild_parameter";

// The name as a constant, which outlives the reading; empty where it is none of the few.
std::string_view known_name(std::string_view name) {
  for (const std::string_view known : {kOrderedDict, kRebuildTensor, kRebuildParameter})
    if (known == name) return known;
  for (const auto& [known, type] : kStorageTypes)
    if (known == name) return known;
  return {};
}

class PickleReader {
 public:
  PickleReader(std::span<const std::byte> bytes, const std::string& file) : bytes_(bytes), file_(file) {
    for (size_t i = 0; i < bytes_as_integers_.size(); ++i) {
      bytes_as_integers_[i].kind = Kind::kInt;
      bytes_as_integers_[i].integer = static_cast<int64_t>(i);
    }
  }

  std::map<std::string, PickledTensor> read() {
    run();
    check(stack_.size() == 1 && marks_.empty(), "it does not end with one value");
    const Value& root = *stack_[0];
    CALDERA_CHECK(root.kind == Kind::kDict, CheckpointError, "{}: expected a dictionary of tensors, got {}",
                  file_, describe(root));
    std::map<std::string, PickledTensor> tensors;
    for (size_t i = 0; i < root.items.size(); i += 2) {
      const Value &key = *root.items[i], &value = *root.items[i + 1];
      CALDERA_CHECK(key.kind == Kind::kText, CheckpointError,
                    "{}: expected tensors by name, got a key that is {}", file_, describe(key));
      CALDERA_CHECK(
          value.kind == Kind::kTensor, CheckpointError,
          "{}: {}: expected a tensor, got {}; a training checkpoint? save its state dictionary alone", file_,
          key.text, describe(value));
      CALDERA_CHECK(tensors.emplace(key.text, *value.tensor).second, CheckpointError,
                    "{}: the name {} occurs twice", file_, key.text);
    }
    return tensors;
  }

 private:
  void check(bool condition, std::string_view what) const {
    CALDERA_CHECK(condition, CheckpointError, "{}: malformed pickle: {} (at byte {})", file_, what,
                  instruction_);
  }
  std::string_view take(uint64_t size) {
    check(size <= bytes_.size() - position_, "it is truncated");
    const std::string_view result(reinterpret_cast<const char*>(bytes_.data()) + position_, size);
    position_ += size;
    return result;
  }
  uint64_t number(uint64_t num_bytes) {
    uint64_t value = 0;
    const std::string_view bytes = take(num_bytes);
    std::memcpy(&value, bytes.data(), num_bytes);
    return value;
  }
  std::string_view line() {
    const auto* begin = reinterpret_cast<const char*>(bytes_.data()) + position_;
    const size_t length = std::string_view(begin, bytes_.size() - position_).find('\n');
    check(length != std::string_view::npos, "it is truncated");
    return take(length + 1).substr(0, length);
  }

  // Counts memory before it is taken, so that what a file costs is bounded by its size.
  void charge(uint64_t num_bytes) {
    memory_ += num_bytes;
    CALDERA_CHECK(
        memory_ <= kMemoryPerByte * bytes_.size() + kMemoryOfAny, CheckpointError,
        "{}: refused: its pickle of {} bytes holds more values than any dictionary of tensors does: over {} "
        "bytes of memory at byte {}",
        file_, bytes_.size(), kMemoryPerByte * bytes_.size() + kMemoryOfAny, instruction_);
  }
  Value& make(Kind kind) {
    charge(sizeof(Value));
    Value& value = values_.emplace_back();
    value.kind = kind;
    return value;
  }
  // `like`: the storage, or the tensor, that it begins as.
  Value& make_tensor(Kind kind, const PickledTensor& like) {
    Value& value = make(kind);
    charge(sizeof(PickledTensor) + like.storage.size() + 2 * sizeof(int64_t) * like.shape.size());
    value.tensor = std::make_unique<PickledTensor>(like);
    return value;
  }
  void push_new(Kind kind, int64_t integer = 0) {
    Value& value = make(kind);
    value.integer = integer;
    stack_.push_back(&value);
  }
  Value& top() {
    const size_t floor = marks_.empty() ? 0 : marks_.back();
    check(stack_.size() > floor, "an instruction lacks its operands");
    return *stack_.back();
  }
  Value& pop() {
    Value& value = top();
    stack_.pop_back();
    return value;
  }
  std::vector<const Value*> pop_to_mark() {
    check(!marks_.empty(), "an instruction lacks its mark");
    std::vector<const Value*> items(stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back()),
                                    stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return items;
  }
  void push_tuple(std::vector<const Value*> items) {
    Value& tuple = make(Kind::kTuple);
    charge(items.size() * sizeof(Value*));
    tuple.items = std::move(items);
    stack_.push_back(&tuple);
  }
  void push_small_tuple(size_t size) {
    std::vector<const Value*> items(size);
    for (size_t i = size; i-- > 0;) items[i] = &pop();
    push_tuple(std::move(items));
  }
  void extend(Kind kind, const std::vector<const Value*>& items) {
    Value& target = top();
    check(target.kind == kind,
          kind == Kind::kDict ? "items for what is no dictionary" : "items for what is no list");
    check(kind != Kind::kDict || items.size() % 2 == 0, "a key without a value");
    charge(2 * items.size() * sizeof(Value*));  // a list grows by doubling
    target.items.insert(target.items.end(), items.begin(), items.end());
  }
  void remember(uint64_t index) {
    const auto [place, is_new] = memo_.insert_or_assign(index, &top());
    if (is_new) charge(kMemoBytes);
  }
  void recall(uint64_t index) {
    const auto found = memo_.find(index);
    check(found != memo_.end(), "it refers to what was never stored");
    stack_.push_back(found->second);
  }

  void run() {
    for (;;) {
      instruction_ = position_;
      check(position_ < bytes_.size(), "it is truncated");
      const auto opcode = static_cast<uint8_t>(number(1));
      if (instruction_ == 0) {
        check(opcode == 0x80, "it does not begin with its protocol");
        const uint64_t protocol = number(1);
        check(protocol == 2, fmt::format("protocol {}; torch.save writes protocol 2", protocol));
        continue;
      }
      if (opcode == '.') break;  // STOP
      step(opcode);
    }
    check(position_ == bytes_.size(), "it goes on after its end");
  }

  void step(uint8_t opcode) {
    switch (opcode) {
      case '(':  // MARK
        return marks_.push_back(stack_.size());
      case 'N':  // NONE
        return stack_.push_back(&none_);
      case 0x88:  // NEWTRUE
        return stack_.push_back(&true_);
      case 0x89:  // NEWFALSE
        return stack_.push_back(&false_);
      case 'K':  // BININT1
        return stack_.push_back(&bytes_as_integers_[number(1)]);
      case 'M':  // BININT2
        return push_new(Kind::kInt, static_cast<int64_t>(number(2)));
      case 'J':  // BININT
        return push_new(Kind::kInt, static_cast<int32_t>(number(4)));
      case 0x8a:  // LONG1
        return push_new(Kind::kInt, long_integer());
      case 'G':  // BINFLOAT: a hyper-parameter; of no use here
        take(8);
        return push_new(Kind::kFloat);
      case 'X': {  // BINUNICODE
        const std::string_view text = take(number(4));
        check(text.find('\0') == std::string_view::npos, "a text holds NUL");
        Value& value = make(Kind::kText);
        value.text = text;
        return stack_.push_back(&value);
      }
      case ')':  // EMPTY_TUPLE
        return stack_.push_back(&empty_tuple_);
      case ']':  // EMPTY_LIST
        return push_new(Kind::kList);
      case '}':  // EMPTY_DICT
        return push_new(Kind::kDict);
      case 't':  // TUPLE
        return push_tuple(pop_to_mark());
      case 0x85:  // TUPLE1
      case 0x86:
      case 0x87:
        return push_small_tuple(opcode - 0x84u);
      case 'a': {  // APPEND
        const Value& item = pop();
        return extend(Kind::kList, {&item});
      }
      case 'e':  // APPENDS
        return extend(Kind::kList, pop_to_mark());
      case 's': {  // SETITEM
        const Value& value = pop();
        const Value& key = pop();
        return extend(Kind::kDict, {&key, &value});
      }
      case 'u':  // SETITEMS
        return extend(Kind::kDict, pop_to_mark());
      case 'q':  // BINPUT
        return remember(number(1));
      case 'r':  // LONG_BINPUT
        return remember(number(4));
      case 'h':  // BINGET
        return recall(number(1));
      case 'j':  // LONG_BINGET
        return recall(number(4));
      case 'c':  // GLOBAL
        return push_name();
      case 'Q':  // BINPERSID
        return push_storage();
      case 'R':  // REDUCE
        return call();
      case 'b': {  // BUILD: the attributes of an OrderedDict (state_dict()'s _metadata), of no use here
        pop();
        return check(top().kind == Kind::kDict, "it sets the state of what is no dictionary");
      }
      default:
        throw CheckpointError(fmt::format(
            "{}: refused: the pickle's instruction 0x{:02x} at byte {} is none that builds a dictionary "
            "of tensors. Nothing was run; if you trust the file, load it with torch and save its tensors "
            "as safetensors",
            file_, opcode, instruction_));
    }
  }

  int64_t long_integer() {
    const uint64_t size = number(1);
    check(size <= 8, "an integer of more than 64 bits");
    const uint64_t value = number(size);
    if (size == 0 || size == 8) return static_cast<int64_t>(value);
    const uint64_t sign = uint64_t{1} << (8 * size - 1);
    return static_cast<int64_t>((value ^ sign) - sign);
  }

  void push_name() {
    const std::string module(line());
    const std::string full = module + " " + std::string(line());
    Value& name = make(Kind::kName);
    name.text = known_name(full);
    CALDERA_CHECK(
        !name.text.empty(), CheckpointError,
        "{}: refused: the pickle names \"{}\" at byte {}, which no dictionary of tensors needs. Nothing was "
        "run; if you trust the file, load it with torch and save its tensors as safetensors",
        file_, full, instruction_);
    stack_.push_back(&name);
  }

  // ("storage", its class, its key, the device it was on, its number of elements)
  void push_storage() {
    const Value& id = pop();
    const auto is = [&](size_t i, Kind kind) { return id.items[i]->kind == kind; };
    check(id.kind == Kind::kTuple && id.items.size() == 5 && is(0, Kind::kText) && is(1, Kind::kName) &&
              is(2, Kind::kText) && is(3, Kind::kText) && is(4, Kind::kInt) && id.items[0]->text == "storage",
          "a persistent object that is no storage");
    const std::optional<at::ScalarType> type = storage_type(id.items[1]->text);
    check(type.has_value(), "a storage of no type");
    check(id.items[4]->integer >= 0, "a storage of a negative size");
    check(id.items[2]->text.size() <= kMaxKeyBytes, "a storage's key of more than 255 bytes");
    PickledTensor storage;
    storage.storage = id.items[2]->text;
    storage.type = *type;
    storage.storage_elements = id.items[4]->integer;
    stack_.push_back(&make_tensor(Kind::kStorage, storage));
  }

  void call() {
    const Value& arguments = pop();
    const Value& function = pop();
    check(function.kind == Kind::kName && arguments.kind == Kind::kTuple, "a call of what is no name");
    if (function.text == kOrderedDict) {
      check(arguments.items.empty(), "an OrderedDict with arguments");
      return push_new(Kind::kDict);
    }
    if (function.text == kRebuildParameter) {  // (tensor, requires_grad, hooks)
      check(arguments.items.size() == 3 && arguments.items[0]->kind == Kind::kTensor,
            "a parameter without its tensor");
      return stack_.push_back(&make_tensor(Kind::kTensor, *arguments.items[0]->tensor));
    }
    check(function.text == kRebuildTensor, "a call of a storage's class");
    rebuild_tensor(arguments.items);
  }

  // (storage, offset, shape, strides, requires_grad, hooks[, metadata])
  void rebuild_tensor(const std::vector<const Value*>& arguments) {
    check(arguments.size() == 6 || arguments.size() == 7, "a tensor with too few or too many arguments");
    check(arguments[0]->kind == Kind::kStorage, "a tensor without a storage");
    check(arguments[1]->kind == Kind::kInt, "a tensor's offset is no integer");
    PickledTensor tensor = *arguments[0]->tensor;
    tensor.offset = arguments[1]->integer;
    tensor.shape = integers(*arguments[2]);
    tensor.strides = integers(*arguments[3]);
    check(tensor.offset >= 0 && tensor.shape.size() == tensor.strides.size(),
          "a tensor's shape and strides differ");
    int64_t last = tensor.offset, elements = 1, product = 1;
    bool fits = true;
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      const int64_t size = tensor.shape[i], stride = tensor.strides[i];
      check(size >= 0 && stride >= 0, "a tensor of a negative size or stride");
      elements = size == 0 ? 0 : elements;
      int64_t step = 0;
      fits = fits && !__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product) &&
             !__builtin_mul_overflow(std::max<int64_t>(size - 1, 0), stride, &step) &&
             !__builtin_add_overflow(last, step, &last);
    }
    check(fits && (elements == 0 || last < tensor.storage_elements), "a tensor reaches beyond its storage");
    stack_.push_back(&make_tensor(Kind::kTensor, tensor));
  }

  std::vector<int64_t> integers(const Value& tuple) const {
    check(tuple.kind == Kind::kTuple, "a shape that is no tuple");
    check(tuple.items.size() <= kMaxDimensions, "a tensor of more than 16 dimensions");
    std::vector<int64_t> result;
    for (const Value* item : tuple.items) {
      check(item->kind == Kind::kInt, "a shape of what are no integers");
      result.push_back(item->integer);
    }
    return result;
  }

  std::span<const std::byte> bytes_;
  const std::string& file_;
  uint64_t position_ = 0, instruction_ = 0;
  // Values of one or two bytes, which nothing changes: one of each is enough.
  Value none_, true_{Kind::kBool, 1}, false_{Kind::kBool, 0}, empty_tuple_{Kind::kTuple};
  std::array<Value, 256> bytes_as_integers_;
  std::deque<Value> values_;  // owns every value: they may refer to each other, even in circles
  std::vector<Value*> stack_;
  std::vector<size_t> marks_;  // heights of the stack
  std::unordered_map<uint64_t, Value*> memo_;
  uint64_t memory_ = 0;  // that the values take, about
};

}  // namespace

std::map<std::string, PickledTensor> read_tensor_pickle(std::span<const std::byte> pickle,
                                                        const std::string& file) {
  return PickleReader(pickle, file).read();
}

}  // namespace caldera
