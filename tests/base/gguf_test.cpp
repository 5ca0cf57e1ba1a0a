// The container is judged here on files built byte by byte; its numbers against llama.cpp's own package are
// judged in tests/model/weights_test.cpp.
#include "base/gguf.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>

#include "base/error.h"
#include "base/files.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

// Writes little-endian GGUF pieces.
struct Bytes {
  std::string text;
  template <class T>
  Bytes& number(T value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  Bytes& string(const std::string& value) {
    number<uint64_t>(value.size());
    text += value;
    return *this;
  }
  Bytes& header(uint64_t num_tensors, uint64_t num_values, uint32_t version = 3) {
    text += "GGUF";
    return number(version).number(num_tensors).number(num_values);
  }
  Bytes& tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset) {
    string(name).number(static_cast<uint32_t>(dims.size()));
    for (const uint64_t dim : dims) number(dim);
    return number(type).number(offset);
  }
  Bytes& pad(size_t alignment = 32) {
    text.resize((text.size() + alignment - 1) / alignment * alignment);
    return *this;
  }
  Bytes& floats(const std::vector<float>& values) {
    for (const float value : values) number(value);
    return *this;
  }
};

class GgufTest : public testing::Test {
 protected:
  GgufFile open(const Bytes& bytes) {
    write_file_atomic(file_, bytes.text);
    return GgufFile(file_);
  }
  std::string refusal(const Bytes& bytes) {
    try {
      open(bytes);
    } catch (const CheckpointError& error) {
      EXPECT_THAT(error.what(), HasSubstr(file_.string()));
      return error.what();
    }
    return "accepted";
  }
  TemporaryFolder folder_;
  const fs::path file_ = folder_.path() / "x.gguf";
};

TEST_F(GgufTest, ReadsEveryValueType) {
  Bytes bytes;
  bytes.header(0, 13);
  bytes.string("u8").number<uint32_t>(0).number<uint8_t>(200);
  bytes.string("i8").number<uint32_t>(1).number<int8_t>(-5);
  bytes.string("u16").number<uint32_t>(2).number<uint16_t>(65535);
  bytes.string("i16").number<uint32_t>(3).number<int16_t>(-300);
  bytes.string("u32").number<uint32_t>(4).number<uint32_t>(4000000000u);
  bytes.string("f32").number<uint32_t>(6).number<float>(0.5f);
  bytes.string("bool").number<uint32_t>(7).number<uint8_t>(1);
  bytes.string("string").number<uint32_t>(8).string("héllo");
  bytes.string("u64").number<uint32_t>(10).number<uint64_t>(1ull << 62);
  bytes.string("f64").number<uint32_t>(12).number<double>(1e-5);
  bytes.string("strings").number<uint32_t>(9).number<uint32_t>(8).number<uint64_t>(2).string("a").string("");
  bytes.string("ints")
      .number<uint32_t>(9)
      .number<uint32_t>(5)
      .number<uint64_t>(2)
      .number<int32_t>(7)
      .number<int32_t>(-7);
  bytes.string("floats").number<uint32_t>(9).number<uint32_t>(6).number<uint64_t>(1).number<float>(2.0f);
  const GgufFile file = open(bytes);
  EXPECT_EQ(file.get<int64_t>("u8"), 200);
  EXPECT_EQ(file.get<int64_t>("i8"), -5);
  EXPECT_EQ(file.get<int64_t>("u16"), 65535);
  EXPECT_EQ(file.get<int64_t>("i16"), -300);
  EXPECT_EQ(file.get<int64_t>("u32"), 4000000000);
  EXPECT_EQ(file.get<double>("f32"), 0.5);
  EXPECT_TRUE(file.get<bool>("bool"));
  EXPECT_EQ(file.get<std::string>("string"), "héllo");
  EXPECT_EQ(file.get<int64_t>("u64"), int64_t{1} << 62);
  EXPECT_EQ(file.get<double>("f64"), 1e-5);
  EXPECT_THAT(file.get<std::vector<std::string>>("strings"), testing::ElementsAre("a", ""));
  EXPECT_THAT(file.get<std::vector<int64_t>>("ints"), testing::ElementsAre(7, -7));
  EXPECT_THAT(file.get<std::vector<double>>("floats"), testing::ElementsAre(2.0));
  EXPECT_EQ(file.get_or<int64_t>("absent", 9), 9);
  EXPECT_FALSE(file.has("absent"));
}

TEST_F(GgufTest, TypedAccessNamesKeyAndTypes) {
  Bytes bytes;
  bytes.header(0, 1, 2).string("n").number<uint32_t>(8).string("text");
  const GgufFile file = open(bytes);
  try {
    file.get<int64_t>("n");
    FAIL();
  } catch (const CheckpointError& error) {
    EXPECT_THAT(error.what(), HasSubstr("n: expected integer, got string"));
  }
  EXPECT_THROW(file.get<std::string>("missing"), CheckpointError);
}

TEST_F(GgufTest, TensorsHaveTorchOrderAndTheirBytes) {
  Bytes bytes;
  bytes.header(2, 0).tensor("a", {3, 2}, 0, 0).tensor("b", {32, 1}, 8, 32).pad();
  bytes.floats({1, 2, 3, 4, 5, 6}).pad();
  bytes.text.append(34, '\x07');
  const GgufFile file = open(bytes);
  ASSERT_EQ(file.tensors().size(), 2u);
  const GgufTensor& a = file.tensors()[0];
  EXPECT_EQ(a.name, "a");
  EXPECT_THAT(a.shape, testing::ElementsAre(2, 3));
  ASSERT_EQ(a.bytes.size(), 24u);
  float last = 0;
  std::memcpy(&last, a.bytes.data() + 20, 4);
  EXPECT_EQ(last, 6.0f);
  EXPECT_EQ(file.tensors()[1].bytes.size(), 34u);
}

TEST_F(GgufTest, RefusesEveryMalformation) {
  const auto value = [](const std::function<void(Bytes&)>& rest) {
    Bytes bytes;
    bytes.header(0, 1).string("k");
    rest(bytes);
    return bytes;
  };
  const auto one_tensor = [](const std::vector<uint64_t>& dims, uint32_t type, uint64_t offset, size_t data) {
    Bytes bytes;
    bytes.header(1, 0).tensor("t", dims, type, offset).pad();
    bytes.text.append(data, '\0');
    return bytes;
  };
  const std::vector<std::pair<Bytes, std::string>> cases = {
      {Bytes{}, "not a GGUF file"},
      {Bytes{"GGU"}, "not a GGUF file"},
      {Bytes{"PK\3\4aaaaaaaaaaaaaaaaaaaa"}, "not a GGUF file"},
      {Bytes{"GGUF"}, "version at byte 4"},
      {Bytes{}.header(0, 0, 1), "version 1;"},
      {Bytes{}.header(0, 0, 0x03000000), "version 50331648;"},
      {Bytes{}.header(0, 1ull << 60), "number of metadata values"},
      {Bytes{}.header(1ull << 60, 0), "number of tensors"},
      {value([](Bytes& b) { b.number<uint32_t>(13); }), "unknown value type 13"},
      {value([](Bytes& b) { b.number<uint32_t>(8).number<uint64_t>(UINT64_MAX).number<uint64_t>(0); }),
       "8 are left"},
      {value([](Bytes& b) { b.number<uint32_t>(10).number<uint64_t>(1ull << 63); }), "too large"},
      {value([](Bytes& b) { b.number<uint32_t>(7).number<uint8_t>(2); }), "boolean of value 2"},
      {value([](Bytes& b) { b.number<uint32_t>(9).number<uint32_t>(9).number<uint64_t>(1); }),
       "array of arrays"},
      {value([](Bytes& b) { b.number<uint32_t>(9).number<uint32_t>(99).number<uint64_t>(0); }),
       "unknown value type 99"},
      {value([](Bytes& b) { b.number<uint32_t>(9).number<uint32_t>(5).number<uint64_t>(1ull << 62); }),
       "does not fit"},
      {Bytes{}
           .header(0, 2)
           .string("k")
           .number<uint32_t>(0)
           .number<uint8_t>(1)
           .string("k")
           .number<uint32_t>(0)
           .number<uint8_t>(1),
       "k occurs twice"},
      {one_tensor({4}, 0, 0, 15), "reach beyond"},
      {one_tensor({4}, 0, 32, 64), "expected offset 0, got 32"},
      {one_tensor({4}, 4, 0, 64), "unknown tensor type 4"},
      {one_tensor({33}, 8, 0, 64), "no multiple of the type's block of 32"},
      {one_tensor({1, 1, 1, 1, 1}, 0, 0, 64), "1 to 4 dimensions, got 5"},
      {one_tensor({0, 4}, 0, 0, 64), "out of range"},
      {one_tensor({1ull << 40, 1ull << 40}, 0, 0, 64), "out of range"},
      {one_tensor({1ull << 60}, 0, 0, 64), "reach beyond"},
      {one_tensor({(1ull << 62) + 1}, 28, 0, 64), "overflows"},
      {Bytes{}.header(1, 0).tensor("t", {4}, 0, 0), "begin beyond the file's end"},
      {Bytes{}
           .header(2, 0)
           .tensor("t", {8}, 0, 0)
           .tensor("t", {8}, 0, 32)
           .pad()
           .floats(std::vector<float>(16)),
       "tensor t occurs twice"},
      {Bytes{}.header(0, 1).string("general.alignment").number<uint32_t>(4).number<uint32_t>(0),
       "general.alignment"},
      {Bytes{}.header(0, 1).string("general.alignment").number<uint32_t>(4).number<uint32_t>(24),
       "general.alignment"},
      {Bytes{}.header(0, 1).string("general.alignment").number<uint32_t>(4).number<uint32_t>(1u << 31),
       "general.alignment"},
      {Bytes{}.header(0, 1).string("general.alignment").number<uint32_t>(8).string("32"),
       "general.alignment"},
  };
  for (size_t i = 0; i < cases.size(); ++i)
    EXPECT_THAT(refusal(cases[i].first), HasSubstr(cases[i].second)) << "case " << i;
}

TEST_F(GgufTest, EveryTruncationIsRefused) {
  Bytes bytes;
  bytes.header(1, 1).string("general.name").number<uint32_t>(8).string("tiny").tensor("t", {4}, 0, 0).pad();
  bytes.floats({1, 2, 3, 4});
  EXPECT_EQ(open(bytes).tensors().size(), 1u);
  for (size_t size = 0; size < bytes.text.size(); ++size)
    EXPECT_NE(refusal(Bytes{bytes.text.substr(0, size)}), "accepted") << size << " bytes";
}

}  // namespace
}  // namespace caldera
