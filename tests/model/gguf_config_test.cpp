// What a GGUF file's metadata say twice, or in an older way, is read as llama.cpp reads it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "model/weights/gguf_llava.h"
#include "model/weights/gguf_weights.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::AllOf;
using testing::HasSubstr;

template <class T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}
std::string gguf_text(const std::string& text) { return raw<uint64_t>(text.size()) + text; }
std::string number_entry(const std::string& key, uint32_t value) {
  return gguf_text(key) + raw<uint32_t>(4) + raw(value);
}
std::string number_entry(const std::string& key, float value) {
  return gguf_text(key) + raw<uint32_t>(6) + raw(value);
}
std::string text_entry(const std::string& key, const std::string& value) {
  return gguf_text(key) + raw<uint32_t>(8) + gguf_text(value);
}
std::string list_entry(const std::string& key, const std::vector<uint32_t>& values) {
  std::string bytes = gguf_text(key) + raw<uint32_t>(9) + raw<uint32_t>(4) + raw<uint64_t>(values.size());
  for (const uint32_t value : values) bytes += raw(value);
  return bytes;
}

class GgufConfigTest : public testing::Test {
 protected:
  // The golden file with entries of its metadata replaced or added (`key` "" adds).
  fs::path changed(const std::vector<std::pair<std::string, std::string>>& entries) {
    std::string bytes = read_file(kGolden / "llama_tiny.gguf");
    uint64_t count = 0;
    std::memcpy(&count, bytes.data() + 16, 8);
    std::string added;
    for (const auto& [old, entry] : entries) {
      if (old.empty()) {
        added += entry;
        ++count;
        continue;
      }
      const size_t at = bytes.find(old);
      EXPECT_NE(at, std::string::npos) << old;
      bytes.replace(at, old.size(), entry);
    }
    bytes.replace(16, 8, raw(count));
    bytes.insert(24, added);
    // The tensors' data begin at a multiple of 32 bytes.
    const size_t data = read_file(kGolden / "llama_tiny.gguf").size() - data_bytes();
    const size_t grown = bytes.size() - read_file(kGolden / "llama_tiny.gguf").size();
    const size_t header_end = header_bytes() + grown, padding = data - header_bytes();
    bytes.erase(header_end, padding);
    bytes.insert(header_end, (32 - header_end % 32) % 32, '\0');
    return temporary_.write("x.gguf", bytes);
  }
  Json config(const std::vector<std::pair<std::string, std::string>>& entries) {
    return open_gguf_decoder(changed(entries)).config;
  }
  std::string refusal(const std::vector<std::pair<std::string, std::string>>& entries) {
    return error_of<CheckpointError>([&] { open_gguf_decoder(changed(entries)); });
  }
  static size_t data_bytes() {
    const GgufFile file(kGolden / "llama_tiny.gguf");
    size_t begin = SIZE_MAX, end = 0;
    for (const GgufTensor& tensor : file.tensors()) {
      begin = std::min(begin, reinterpret_cast<size_t>(tensor.bytes.data()));
      end = std::max(end, reinterpret_cast<size_t>(tensor.bytes.data() + tensor.bytes.size()));
    }
    const size_t size = fs::file_size(kGolden / "llama_tiny.gguf");
    return size - (size - (end - begin)) / 32 * 32;
  }
  // Behind the last tensor's entry: its name, dimensions, type and offset.
  static size_t header_bytes() {
    const GgufFile file(kGolden / "llama_tiny.gguf");
    const std::string bytes = read_file(kGolden / "llama_tiny.gguf");
    const GgufTensor& last = file.tensors().back();
    return bytes.rfind(gguf_text(last.name)) + 8 + last.name.size() + 4 + 8 * last.shape.size() + 4 + 8;
  }
  TemporaryFolder temporary_;
};

TEST_F(GgufConfigTest, AFactorWithoutATypeIsLinear) {
  const Json linear = {{"rope_type", "linear"}, {"factor", 4.0}};
  EXPECT_FALSE(config({}).contains("rope_scaling"));
  EXPECT_EQ(config({{"", number_entry("llama.rope.scaling.factor", 4.0f)}})["rope_scaling"], linear);
  EXPECT_EQ(config({{"", number_entry("llama.rope.scale_linear", 4.0f)}})["rope_scaling"], linear);
  EXPECT_EQ(config({{"", number_entry("llama.rope.scale_linear", 2.0f)},
                    {"", number_entry("llama.rope.scaling.factor", 4.0f)}})["rope_scaling"],
            linear);
  EXPECT_EQ(config({{"", number_entry("llama.rope.scaling.factor", 4.0f)},
                    {"", text_entry("llama.rope.scaling.type", "linear")}})["rope_scaling"],
            linear);
  for (const auto& entry :
       {number_entry("llama.rope.scale_linear", 1.0f), number_entry("llama.rope.scaling.factor", 0.0f)})
    EXPECT_FALSE(config({{"", entry}}).contains("rope_scaling"));
  EXPECT_FALSE(config({{"", number_entry("llama.rope.scaling.factor", 4.0f)},
                       {"", text_entry("llama.rope.scaling.type", "none")}})
                   .contains("rope_scaling"));
}

TEST_F(GgufConfigTest, ListsOfOneNumberALayer) {
  const std::string key = "llama.attention.head_count_kv", mlp = "llama.feed_forward_length";
  EXPECT_EQ(config({{number_entry(key, 2u), list_entry(key, {2, 2})}})["num_key_value_heads"], 2);
  EXPECT_EQ(config({{number_entry(mlp, 96u), list_entry(mlp, {96, 96})}})["intermediate_size"], 96);
  EXPECT_THAT(refusal({{number_entry(key, 2u), list_entry(key, {2, 4})}}),
              HasSubstr(key + ": expected one number, or the same for each layer, got [2, 4]"));
  EXPECT_THAT(refusal({{number_entry(key, 2u), list_entry(key, {})}}), HasSubstr("for each layer, got []"));
  EXPECT_THAT(refusal({{number_entry(key, 2u), text_entry(key, "2")}}),
              HasSubstr(key + ": expected integer, got string"));
}

TEST_F(GgufConfigTest, OnePartOfASplitModelIsNamed) {
  const std::vector<std::pair<std::string, std::string>> split = {{"", number_entry("split.no", 1u)},
                                                                  {"", number_entry("split.count", 3u)}};
  EXPECT_THAT(refusal(split), AllOf(HasSubstr("x.gguf: part 2 of a model cut into 3 files"),
                                    HasSubstr("llama-gguf-split --merge x.gguf OUT.gguf")));
  EXPECT_EQ(refusal({{"", number_entry("split.count", 1u)}}), "accepted");
  fs::create_directories(temporary_.path() / "folder");
  for (const char* name : {"a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "mmproj.gguf"})
    write_file_atomic(temporary_.path() / "folder" / name, "");
  EXPECT_THAT(error_of<CheckpointError>([&] { find_gguf_llava(temporary_.path() / "folder"); }),
              HasSubstr("got 2 and 1; keep one pair a folder, parts of a split model joined"));
}

TEST_F(GgufConfigTest, TensorsWithoutDimensionsAreRefused) {
  const std::string name = "v.blk.0.ffn_up.weight";
  std::string bytes = "GGUF" + raw<uint32_t>(3) + raw<uint64_t>(1) + raw<uint64_t>(1) +
                      text_entry("general.architecture", "clip") + gguf_text(name) + raw<uint32_t>(0) +
                      raw<uint32_t>(0) + raw<uint64_t>(0);
  bytes.resize((bytes.size() + 31) / 32 * 32 + 4);
  const fs::path file = temporary_.write("mmproj.gguf", bytes);
  EXPECT_EQ(error_of<CheckpointError>([&] { make_gguf_vision_tower(file); }),
            file.string() + ": malformed GGUF: " + name + ": expected 1 to 4 dimensions, got 0");
}

}  // namespace
}  // namespace caldera
