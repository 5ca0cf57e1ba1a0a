// Files of torch.save, whole and malformed; goldens by scripts/make_goldens_pickle.py.
#include "model/weights/torch_pickle.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "base/error.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using namespace std::string_literals;


std::string little(uint64_t value, int num_bytes) {
  std::string bytes;
  for (int i = 0; i < num_bytes; ++i)
    bytes += static_cast<char>(static_cast<unsigned char>(i < 8 ? value >> (8 * i) : 0));
  return bytes;
}

struct Member {
  std::string name, data;
  uint64_t method = 0;
  std::string local_name = "";  // "": the same
};

// A zip archive; `zip64` keeps sizes and offsets in 64 bits.
std::string zip(const std::vector<Member>& members, bool zip64 = false) {
  std::string bytes, directory;
  for (const Member& m : members) {
    const std::string& local_name = m.local_name.empty() ? m.name : m.local_name;
    const uint64_t at = bytes.size(), size = m.data.size();
    const std::string sizes =
        zip64 ? little(UINT32_MAX, 4) + little(UINT32_MAX, 4) : little(size, 4) + little(size, 4);
    const std::string extra =
        zip64 ? little(1, 2) + little(24, 2) + little(size, 8) + little(size, 8) + little(at, 8) : "";
    const std::string common =
        little(0, 2) + little(m.method, 2) + little(0, 8) + sizes;  // flags, method, time, CRC
    bytes +=
        "PK\3\4" + little(20, 2) + common + little(local_name.size(), 2) + little(0, 2) + local_name + m.data;
    directory += "PK\1\2" + little(20, 2) + little(20, 2) + common + little(m.name.size(), 2) +
                 little(extra.size(), 2) + little(0, 10) + little(zip64 ? UINT32_MAX : at, 4) + m.name +
                 extra;
  }
  const uint64_t begin = bytes.size(), size = directory.size(), count = members.size();
  bytes += directory;
  if (zip64) {
    const uint64_t end = bytes.size();
    bytes += "PK\6\6" + little(44, 8) + little(0, 12) + little(count, 8) + little(count, 8) +
             little(size, 8) + little(begin, 8);
    bytes += "PK\6\7" + little(0, 4) + little(end, 8) + little(1, 4);
    return bytes + "PK\5\6" + little(0, 4) + little(0xFFFF, 2) + little(0xFFFF, 2) + little(UINT32_MAX, 4) +
           little(UINT32_MAX, 4) + little(0, 2);
  }
  return bytes + "PK\5\6" + little(0, 4) + little(count, 2) + little(count, 2) + little(size, 4) +
         little(begin, 4) + little(0, 2);
}

// Pieces of pickles.
const std::string kProtocol = "\x80\2";
std::string text(const std::string& value) { return "X" + little(value.size(), 4) + value; }
std::string integer(uint64_t value) { return "\x8a\x08" + little(value, 8); }
std::string integers(const std::vector<uint64_t>& values) {
  std::string bytes = "(";
  for (const uint64_t value : values) bytes += integer(value);
  return bytes + "t";
}
std::string tensor(const std::vector<uint64_t>& shape, const std::vector<uint64_t>& strides,
                   uint64_t offset = 0, uint64_t storage_elements = 6,
                   const std::string& type = "FloatStorage") {
  return "ctorch._utils\n_rebuild_tensor_v2\n(("s + text("storage") + "ctorch\n" + type + "\n" + text("0") +
         text("cpu") + integer(storage_elements) + "tQ" + integer(offset) + integers(shape) +
         integers(strides) +
         "\x89"
         "ccollections\nOrderedDict\n)RtR";
}
std::string dictionary(const std::string& value) { return kProtocol + "}" + text("a") + value + "s."; }
const std::string kValidPickle = dictionary(tensor({2, 3}, {3, 1}));

class TorchPickleTest : public testing::Test {
 protected:

  std::unique_ptr<TensorSource> open(const std::string& bytes) {
    std::ofstream(folder_ / "w.bin", std::ios::binary) << bytes;
    return open_torch_pickle(folder_ / "w.bin");
  }
  static std::vector<Member> members(const std::string& pickle) {
    return {{"archive/data.pkl", pickle}, {"archive/data/0", std::string(24, '\0')}};
  }
  std::string refusal(const std::string& bytes) {
    try {
      open(bytes);
      return "accepted";
    } catch (const CheckpointError& error) {
      EXPECT_THAT(error.what(), testing::StartsWith((folder_ / "w.bin").string() + ": "));
      return error.what();
    }
  }
  std::string pickle_refusal(const std::string& pickle) { return refusal(zip(members(pickle))); }

  TemporaryFolder temporary_;
  const fs::path folder_ = temporary_.path();
};

TEST_F(TorchPickleTest, HoldsWhatTorchSaved) {
  const auto source = open_torch_pickle(kGolden / "torch_pickle.bin");
  const auto expected = open_safetensors(kGolden / "torch_pickle.safetensors");
  ASSERT_EQ(source->names(), expected->names());
  EXPECT_EQ(source->names().size(), 317u);
  for (const std::string& name : source->names()) {
    EXPECT_EQ(source->shape(name), expected->shape(name)) << name;
    EXPECT_EQ(source->read(name).scalar_type(), expected->read(name).scalar_type()) << name;
    EXPECT_TRUE(at::equal(source->read(name), expected->read(name))) << name;
  }
  EXPECT_EQ(source->where("weight"), (kGolden / "torch_pickle.bin").string());
  EXPECT_THROW(source->read("absent"), CheckpointError);
}

TEST_F(TorchPickleTest, ReadsWhatItsOwnWriterMakes) {  // else the refusals below would prove nothing
  for (const bool zip64 : {false, true}) {
    std::vector<Member> files = members(kValidPickle);
    const float values[] = {0, 1, 2, 3, 4, 5};
    files[1].data.assign(reinterpret_cast<const char*>(values), sizeof values);
    const auto source = open(zip(files, zip64));
    EXPECT_TRUE(at::equal(source->read("a"), at::arange(6, at::kFloat).view({2, 3})));
    const auto column = open(zip({{"archive/data.pkl", dictionary(tensor({2}, {3}, 1))}, files[1]}, zip64));
    EXPECT_TRUE(at::equal(column->read("a"), at::tensor({1.0f, 4.0f})));
  }
}

TEST_F(TorchPickleTest, NothingButTensorsIsEverCalled) {
  // The classic: os.system with a command.
  EXPECT_THAT(pickle_refusal(kProtocol + "cos\nsystem\n(" + text("touch /tmp/caldera-owned") + "tR."),
              HasSubstr("refused: the pickle names \"os system\" at byte 2"));
  for (const char* name :
       {"builtins\neval", "builtins\ngetattr", "torch\nload", "torch.nn.modules.linear\nLinear",
        "torch._utils\n_rebuild_tensor", "collections\nOrderedDict\n\0", "numpy\nndarray"})
    EXPECT_THAT(pickle_refusal(dictionary("c"s + name + "\n")), HasSubstr("refused: ")) << name;
  // Instructions of other protocols, and those that make objects.
  const std::map<std::string, std::string> opcodes = {{"i", "0x69"},
                                                      {"o", "0x6f"},
                                                      {"\x81", "0x81"},
                                                      {"\x93", "0x93"},
                                                      {"\x82", "0x82"},
                                                      {"P", "0x50"},
                                                      {"S", "0x53"},
                                                      {"\x92", "0x92"},
                                                      {"\x95", "0x95"},
                                                      {"F", "0x46"},
                                                      {std::string(1, '\0'), "0x00"}};
  for (const auto& [opcode, name] : opcodes)
    EXPECT_THAT(pickle_refusal(kProtocol + opcode + "os\nsystem\n."),
                HasSubstr("refused: the pickle's instruction " + name + " at byte 2"));
  EXPECT_THAT(pickle_refusal(dictionary("ctorch\nFloatStorage\n)R")),
              HasSubstr("a call of a storage's class"));
  EXPECT_THAT(pickle_refusal(dictionary("K\1)R")), HasSubstr("a call of what is no name"));
  try {
    open_torch_pickle(kGolden / "torch_pickle_module.bin");
    FAIL();
  } catch (const CheckpointError& error) {
    EXPECT_THAT(error.what(), HasSubstr("torch.nn.modules.linear Linear"));
  }
}

TEST_F(TorchPickleTest, MalformedPicklesAreRefused) {
  const std::vector<std::tuple<const char*, std::string, const char*>> cases = {
      {"empty", "", "truncated"},
      {"no protocol", "}.", "does not begin with its protocol"},
      {"protocol 4", "\x80\4}.", "protocol 4; torch.save writes protocol 2"},
      {"never stops", kProtocol + "}", "truncated"},
      {"goes on", kValidPickle + "}", "goes on after its end"},
      {"two values", kProtocol + "}}.", "does not end with one value"},
      {"an open mark", kProtocol + "(}.", "does not end with one value"},
      {"nothing", kProtocol + ".", "does not end with one value"},
      {"text beyond the end", kProtocol + "X" + little(UINT32_MAX, 4) + "ab.", "truncated"},
      {"text with NUL", kProtocol + text("a\0b"s) + ".", "holds NUL"},
      {"name without an end", kProtocol + "ctorch", "truncated"},
      {"integer of 9 bytes", kProtocol + "\x8a\x09" + std::string(9, 'x') + ".", "more than 64 bits"},
      {"no operands", kProtocol + "s.", "lacks its operands"},
      {"operands behind the mark", kProtocol + "}K\1(s.", "lacks its operands"},
      {"no mark", kProtocol + "t.", "lacks its mark"},
      {"key without a value", kProtocol + "}(K\1u.", "a key without a value"},
      {"item of a list in a dictionary", kProtocol + "}K\1a.", "items for what is no list"},
      {"items of no dictionary", kProtocol + "](K\1K\2u.", "items for what is no dictionary"},
      {"state of no dictionary", kProtocol + "]}b.", "what is no dictionary"},
      {"unknown reference", kProtocol + "h\7.", "never stored"},
      {"persistent integer", dictionary("K\1Q"), "persistent object"},
      {"storage of a text", dictionary("(" + text("storage") + text("x") + text("0") + text("cpu") + "K\1tQ"),
       "persistent object"},
      {"storage of OrderedDicts",
       dictionary(tensor({1}, {1}, 0, 6, "FloatStorage\n0ccollections\nOrderedDict")), "refused"},
      {"negative storage", dictionary(tensor({1}, {1}, 0, UINT64_MAX)), "negative size"},
      {"OrderedDict of something", dictionary("ccollections\nOrderedDict\n(]tR"), "with arguments"},
      {"tensor of nothing", dictionary("ctorch._utils\n_rebuild_tensor_v2\n)R"), "too few"},
      {"parameter of nothing", dictionary("ctorch._utils\n_rebuild_parameter\n(K\1K\1K\1tR"), "parameter"},
      {"a list", kProtocol + "].", "expected a dictionary of tensors, got a list"},
      {"a number by name", dictionary("K\1"), "a: expected a tensor, got an integer"},
      {"a dictionary in it", dictionary("}"),
       "a: expected a tensor, got a dictionary; a training checkpoint?"},
      {"a tensor by number", kProtocol + "}K\1" + tensor({1}, {1}) + "s.", "got a key that is an integer"},
      {"a name twice", kProtocol + "}(" + text("a") + tensor({1}, {1}) + text("a") + tensor({1}, {1}) + "u.",
       "the name a occurs twice"},
      // Views.
      {"too many rows", dictionary(tensor({3, 3}, {3, 1})), "reaches beyond its storage"},
      {"too far", dictionary(tensor({2, 3}, {3, 1}, 1)), "reaches beyond its storage"},
      {"negative offset", dictionary(tensor({1}, {1}, UINT64_MAX)), "shape and strides"},
      {"negative stride", dictionary(tensor({2}, {UINT64_MAX})), "negative size or stride"},
      {"negative size", dictionary(tensor({UINT64_MAX}, {1})), "negative size or stride"},
      {"overflowing reach", dictionary(tensor({3}, {uint64_t{1} << 62})), "reaches beyond its storage"},
      {"overflowing product", dictionary(tensor({uint64_t{1} << 32, uint64_t{1} << 32}, {0, 0})),
       "reaches beyond its storage"},
      {"strides of another rank", dictionary(tensor({2, 3}, {1})), "shape and strides differ"},
      // Storages.
      {"storage larger than its data", dictionary(tensor({2, 3}, {3, 1}, 0, 7)),
       "expected a storage of 7 elements of 4 bytes, got 24 bytes"},
      {"storage of half as much", dictionary(tensor({2, 3}, {3, 1}, 0, 6, "HalfStorage")),
       "expected a storage of 6 elements of 2 bytes, got 24 bytes"},
      {"storage of a strange type", dictionary(tensor({1}, {1}, 0, 6, "QInt8Storage")), "refused"},
  };
  for (const auto& [name, pickle, message] : cases)
    EXPECT_THAT(pickle_refusal(pickle), HasSubstr(message)) << name;
}

// A few bytes a value, and each must not cost hundreds in memory: refused long before a gigabyte is taken.
TEST_F(TorchPickleTest, MemoryIsBoundedByTheFile) {
  const auto repeated = [](const std::string& piece, size_t num_bytes) {
    std::string all;
    while (all.size() < num_bytes) all += piece;
    return all;
  };
  const std::vector<uint64_t> sixteen(16, 1);
  const std::map<std::string, std::string> cases = {
      {"empty lists", "(" + repeated("]", 1'000'000) + "t"},
      {"empty dictionaries", "(" + repeated("}", 1'000'000) + "t"},
      // One storage's tuple recalled again and again.
      {"storages", "((" + text("storage") + "ctorch\nFloatStorage\n" + text(std::string(200, '7')) +
                       text("cpu") + integer(6) + "tq\1" + repeated("h\1Q", 1'000'000) + "t"},
      // One tensor copied again and again.
      {"tensors", "(ctorch._utils\n_rebuild_parameter\nq\5(" + tensor(sixteen, sixteen) + "\x89Ntq\6" +
                      repeated("h\5h\6R", 1'000'000) + "t"}};
  for (const auto& [name, pickle] : cases)
    EXPECT_THAT(pickle_refusal(kProtocol + pickle + "."),
                HasSubstr("holds more values than any dictionary of tensors"))
        << name;
  EXPECT_THAT(pickle_refusal(dictionary(tensor(std::vector<uint64_t>(17, 1), std::vector<uint64_t>(17, 1)))),
              HasSubstr("a tensor of more than 16 dimensions"));
  EXPECT_THAT(pickle_refusal(kProtocol + "((" + text("storage") + "ctorch\nFloatStorage\n" +
                             text(std::string(256, '7')) + text("cpu") + integer(6) + "tQt."),
              HasSubstr("a storage's key of more than 255 bytes"));
  // A real dictionary of any length is far from the bound.
  std::string many = kProtocol + "}(";
  for (int i = 0; i < 20'000; ++i)
    many += text(fmt::format("model.layers.{}.weight", i)) + tensor({2, 3}, {3, 1});
  EXPECT_EQ(pickle_refusal(many + "u."), "accepted");
}

TEST_F(TorchPickleTest, ValuesThatHoldThemselvesAreReleased) {
  EXPECT_THAT(pickle_refusal(kProtocol + "}q\1" + text("a") + "h\1s."), HasSubstr("got a dictionary"));
}

TEST_F(TorchPickleTest, MalformedArchivesAreRefused) {
  const auto with = [&](std::vector<Member> more) {
    std::vector<Member> all = members(kValidPickle);
    all.insert(all.end(), more.begin(), more.end());
    return zip(all);
  };
  EXPECT_EQ(refusal(with({})), "accepted");
  EXPECT_THAT(refusal(""), HasSubstr("not a file of torch.save"));
  EXPECT_THAT(refusal("version https://git-lfs.github.com/spec/v1\n"),
              HasSubstr("a pointer of Git LFS, not the file itself"));
  EXPECT_THAT(refusal(zip({{"archive/data/0", ""}})), HasSubstr("without data.pkl"));
  EXPECT_THAT(refusal(zip({{"a/b/data.pkl", kValidPickle}})), HasSubstr("without data.pkl"));
  EXPECT_THAT(refusal(zip({{"archive/data.pkl", kValidPickle}})), HasSubstr("a: its storage data/0 is missing"));
  EXPECT_THAT(refusal(with({{"archive/constants.pkl", ""}})), HasSubstr("TorchScript"));
  EXPECT_THAT(refusal(with({{"archive/byteorder", "big"}})), HasSubstr("big-endian"));
  EXPECT_THAT(refusal(with({{"archive/data/0", std::string(24, '\1')}})), HasSubstr("data/0 occurs twice"));
  EXPECT_THAT(refusal(with({{"archive/x", "abc", 8}})), HasSubstr("is compressed"));
  EXPECT_THAT(refusal(with({{"archive/x", "abc", 0, "archive/y"}})), HasSubstr("has two names"));
  EXPECT_THAT(refusal(with({{"a\0b"s, ""}})), HasSubstr("NUL"));

  const std::string good = zip(members(kValidPickle));
  for (size_t size = 2; size < good.size(); ++size)
    EXPECT_NE(refusal(good.substr(0, size)), "accepted") << size << " bytes";
  // One byte of the directory or of its end set to 0xFF: refused, or (times, checksums, versions) of no
  // meaning here.
  const size_t directory = good.find("PK\1\2");
  int num_refused = 0;
  for (size_t i = directory; i < good.size(); ++i) {
    std::string changed = good;
    changed[i] = '\xFF';
    if (refusal(changed) != "accepted") ++num_refused;
  }
  EXPECT_GT(num_refused, 90);
  // Two members at one place.
  std::string overlapping = good;
  const size_t second = overlapping.find("PK\1\2", directory + 1);
  overlapping.replace(second + 42, 4, little(0, 4));
  EXPECT_THAT(refusal(overlapping), HasSubstr("has two names"));
  // A zip64 record that leads far outside.
  std::string far = zip(members(kValidPickle), true);
  far.replace(far.find("PK\6\7") + 8, 8, little(UINT64_MAX - 8, 8));
  EXPECT_THAT(refusal(far), HasSubstr("an offset leads beyond its end"));
}

TEST_F(TorchPickleTest, OlderFormatIsNamed) {
  try {
    open_torch_pickle(kGolden / "torch_pickle_old.bin");
    FAIL();
  } catch (const CheckpointError& error) {
    EXPECT_THAT(error.what(), HasSubstr("the format of PyTorch before 1.6"));
  }
}

TEST_F(TorchPickleTest, FoldersOfPickles) {
  fs::copy_file(kGolden / "torch_pickle.bin", folder_ / "pytorch_model.bin");
  EXPECT_TRUE(has_weights(folder_));
  EXPECT_TRUE(open_weights_folder(folder_)->has("weight"));
  fs::rename(folder_ / "pytorch_model.bin", folder_ / "pytorch_model-00001-of-00001.bin");
  EXPECT_FALSE(has_weights(folder_));
  write_json(folder_ / "pytorch_model.bin.index.json",
             {{"weight_map", {{"weight", "pytorch_model-00001-of-00001.bin"}}}});
  const auto sharded = open_weights_folder(folder_);
  EXPECT_EQ(sharded->names(), std::vector<std::string>{"weight"});
  EXPECT_EQ(sharded->read("weight").numel(), 15);
  write_safetensors(folder_ / "model.safetensors", {{"b", at::ones({1})}});  // goes first
  EXPECT_EQ(open_weights_folder(folder_)->names(), std::vector<std::string>{"b"});
}

}  // namespace
}  // namespace caldera
