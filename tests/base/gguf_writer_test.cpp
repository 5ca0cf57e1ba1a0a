// What is written is judged by the reader here, and by llama.cpp's own package in tests/parity/gguf_files.py.
#include "base/gguf_writer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "base/error.h"
#include "base/gguf.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class GgufWriterTest : public testing::Test {
 protected:
  static GgufTensorToWrite tensor(const std::string& name, std::vector<int64_t> shape, GgmlType type,
                                  size_t num_bytes) {
    return {name, std::move(shape), type, [num_bytes] {
              std::vector<std::byte> bytes(num_bytes);
              for (size_t i = 0; i < num_bytes; ++i) bytes[i] = static_cast<std::byte>(i * 7);
              return bytes;
            }};
  }
  std::string refusal(const GgufFields& fields, const std::vector<GgufTensorToWrite>& tensors) {
    try {
      write_gguf(file_, fields, tensors);
    } catch (const Error& error) {
      EXPECT_FALSE(fs::exists(file_));  // nothing half-written
      return error.what();
    }
    return "accepted";
  }
  TemporaryFolder folder_;
  const fs::path file_ = folder_.path() / "x.gguf";
};

TEST_F(GgufWriterTest, ReadsBack) {
  write_gguf(file_,
             {{"a.size", 4000000000u},
              {"a.number", 0.5f},
              {"a.yes", true},
              {"a.no", false},
              {"a.text", std::string("t\0x", 3)},
              {"a.ids", std::vector<int32_t>{-1, 2}},
              {"a.numbers", std::vector<float>{1.5f, -2}},
              {"a.words", std::vector<std::string>{"", "\xE2\x96\x81the"}}},
             {tensor("one", {3}, GgmlType::kF32, 12), tensor("two", {2, 5}, GgmlType::kF16, 20),
              tensor("three", {2, 3, 64}, GgmlType::kQ8_0, 2 * 3 * 2 * 34),
              tensor("four", {1}, GgmlType::kBF16, 2)});
  const GgufFile file(file_);
  EXPECT_EQ(file.get<int64_t>("a.size"), 4000000000);
  EXPECT_EQ(file.get<double>("a.number"), 0.5);
  EXPECT_TRUE(file.get<bool>("a.yes"));
  EXPECT_FALSE(file.get<bool>("a.no"));
  EXPECT_EQ(file.get<std::string>("a.text"), std::string("t\0x", 3));
  EXPECT_THAT(file.get<std::vector<int64_t>>("a.ids"), ElementsAre(-1, 2));
  EXPECT_THAT(file.get<std::vector<double>>("a.numbers"), ElementsAre(1.5, -2));
  EXPECT_THAT(file.get<std::vector<std::string>>("a.words"), ElementsAre("", "\xE2\x96\x81the"));
  ASSERT_EQ(file.tensors().size(), 4u);
  EXPECT_THAT(file.tensors()[2].shape, ElementsAre(2, 3, 64));
  EXPECT_EQ(file.tensors()[2].type, 8u);
  for (const GgufTensor& read : file.tensors()) {
    for (size_t i = 0; i < read.bytes.size(); ++i)
      ASSERT_EQ(read.bytes[i], static_cast<std::byte>(i * 7)) << read.name;
    EXPECT_EQ(reinterpret_cast<uintptr_t>(read.bytes.data()) % 32, 0u)
        << read.name;  // llama.cpp maps them in place
  }
}

TEST_F(GgufWriterTest, RefusesWhatTheFormatCannotHold) {
  EXPECT_THAT(refusal({}, {tensor(std::string(64, 'x'), {1}, GgmlType::kF32, 4)}),
              HasSubstr("names have 1 to 63 bytes"));
  EXPECT_THAT(refusal({}, {tensor("", {1}, GgmlType::kF32, 4)}), HasSubstr("names have 1 to 63 bytes"));
  EXPECT_THAT(refusal({}, {tensor("x", {1}, GgmlType::kF32, 4), tensor("x", {1}, GgmlType::kF32, 4)}),
              HasSubstr("tensor x is given twice"));
  EXPECT_THAT(refusal({{"k", 1u}, {"k", 2u}}, {}), HasSubstr("metadata key k is given twice"));
  EXPECT_THAT(refusal({}, {tensor("x", {1, 1, 1, 1, 1}, GgmlType::kF32, 4)}),
              HasSubstr("1 to 4 dimensions, got 5"));
  EXPECT_THAT(refusal({}, {tensor("x", {3, 0}, GgmlType::kF32, 0)}),
              HasSubstr("x: shape [3, 0] holds no elements"));
  EXPECT_THAT(refusal({}, {tensor("x", {2, 33}, GgmlType::kQ8_0, 70)}),
              HasSubstr("rows of 33 elements are no multiple"));
  EXPECT_THAT(refusal({}, {tensor("x", {2}, GgmlType::kF32, 7)}), HasSubstr("x: expected 8 bytes, got 7"));
}

}  // namespace
}  // namespace caldera
