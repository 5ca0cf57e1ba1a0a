#include "model/weights/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;

class SafetensorsTest : public testing::Test {
 protected:

  // 8 bytes of length, the header, `body` zero bytes.
  static std::string file_bytes(const std::string& header, size_t body) {
    const uint64_t length = header.size();
    std::string bytes(reinterpret_cast<const char*>(&length), 8);
    return bytes + header + std::string(body, '\0');
  }
  static std::string with_length(uint64_t length, const std::string& rest) {
    return std::string(reinterpret_cast<const char*>(&length), 8) + rest;
  }
  std::unique_ptr<TensorSource> open(const std::string& bytes) {
    write_file_atomic(folder_ / "t.safetensors", bytes);
    return open_safetensors(folder_ / "t.safetensors");
  }
  std::string refusal(const std::string& bytes) {
    try {
      open(bytes);
      return "accepted";
    } catch (const CheckpointError& error) {
      EXPECT_THAT(error.what(), HasSubstr("t.safetensors: malformed safetensors: "));
      return error.what();
    }
  }
  TemporaryFolder temporary_;
  const fs::path folder_ = temporary_.path();
};

// One tensor "a" of two float32.
constexpr const char* kValid = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";

// The 34 files of scripts/make_goldens_safetensors.py: what the reference accepts is accepted, but for three.
TEST_F(SafetensorsTest, AcceptsWhatTheReferenceDoes) {
  const Json cases = read_json(fs::path(CALDERA_SOURCE_DIR) / "tests/golden/safetensors_cases.json");
  int num_stricter = 0;
  for (const Json& row : cases) {
    std::string bytes;
    for (const Json& piece : row["pieces"]) {
      const std::string hex = piece[0].get<std::string>();
      std::string part;
      for (size_t i = 0; i < hex.size(); i += 2)
        part += static_cast<char>(static_cast<unsigned char>(std::stoi(hex.substr(i, 2), nullptr, 16)));
      for (int64_t i = piece[1].get<int64_t>(); i > 0; --i) bytes += part;
    }
    EXPECT_EQ(refusal(bytes) == "accepted", row["ours"].get<bool>()) << row["name"];
    num_stricter += row["accepted"] != row["ours"] ? 1 : 0;
  }
  EXPECT_EQ(cases.size(), 34u);
  EXPECT_EQ(num_stricter, 3);
}

// Why each is refused.
TEST_F(SafetensorsTest, RefusesWhatTheReferenceRefuses) {
  const std::string deep = "{\"a\":" + std::string(100000, '[') + std::string(100000, ']') + "}";
  const std::string two =
      R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[%]},"b":{"dtype":"U8","shape":[4],"data_offsets":[#]}})";
  const auto pair = [&](const std::string& first, const std::string& second) {
    std::string header = two;
    header.replace(header.find('%'), 1, first);
    header.replace(header.find('#'), 1, second);
    return header;
  };
  const auto one = [](const std::string& fields) { return "{\"a\":{" + fields + "}}"; };
  const std::vector<std::tuple<const char*, std::string, const char*>> cases = {
      {"empty file", "", "0 bytes"},
      {"seven bytes", std::string(7, '\0'), "7 bytes"},
      {"header longer than the file", with_length(1000, kValid), "1000 bytes in a file of"},
      {"header of 2^63", with_length(uint64_t{1} << 63, kValid), "at most 100000000"},
      {"header above 100 MB", with_length(100'000'001, kValid), "at most 100000000"},
      {"not UTF-8", file_bytes("{\"\xff\xfe\":1}", 0), "not JSON"},
      {"not JSON", file_bytes("{a:1}", 0), "not JSON"},
      {"trailing garbage", file_bytes(std::string(kValid) + "x", 8), "not JSON"},
      {"trailing NUL and garbage", file_bytes(std::string(kValid) + std::string("\0x", 2), 8), "NUL byte"},
      {"top-level array", file_bytes("[]", 0), "does not begin with"},
      {"100000 levels deep", file_bytes(deep, 0), "nested deeper"},
      {"body short", file_bytes(kValid, 7), "take 8 bytes, the file holds 7"},
      {"body long", file_bytes(kValid, 9), "take 8 bytes, the file holds 9"},
      {"gap", file_bytes(pair("0,4", "5,9"), 9), "expected its data at byte 4, got 5"},
      {"overlap", file_bytes(pair("0,4", "3,7"), 7), "expected its data at byte 4, got 3"},
      {"reversed offsets", file_bytes(one(R"("dtype":"U8","shape":[4],"data_offsets":[4,0])"), 4),
       "reversed"},
      {"negative offset", file_bytes(one(R"("dtype":"U8","shape":[4],"data_offsets":[-4,0])"), 4),
       "unsigned integer"},
      {"size differs", file_bytes(one(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), 8),
       "3 elements of F32"},
      {"product overflows",
       file_bytes(one(R"("dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0])"), 0),
       "overflows"},
      {"bytes overflow",
       file_bytes(one(R"("dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0])"), 0),
       "take 8 bytes each"},
      {"float shape", file_bytes(one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), 8),
       "unsigned integer"},
      {"negative shape", file_bytes(one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), 8),
       "unsigned integer"},
      {"unknown dtype", file_bytes(one(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])"), 8),
       "unknown dtype \"F33\""},
      {"no dtype", file_bytes(one(R"("shape":[2],"data_offsets":[0,8])"), 8), "\"dtype\" is missing"},
      {"no shape", file_bytes(one(R"("dtype":"F32","data_offsets":[0,8])"), 8), "\"shape\" is missing"},
      {"no offsets", file_bytes(one(R"("dtype":"F32","shape":[2])"), 8), "\"data_offsets\" is missing"},
      {"three offsets", file_bytes(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), 8), "no pair"},
      {"entry no object", file_bytes(R"({"a":3})", 0), "expected an object"},
      {"metadata of numbers", file_bytes(R"({"__metadata__":{"k":1}})", 0),
       "__metadata__[\"k\"] is no string"},
      {"nested metadata", file_bytes(R"({"__metadata__":{"k":{"l":"m"}}})", 0),
       "__metadata__[\"k\"] is no string"},
  };
  for (const auto& [name, bytes, message] : cases) EXPECT_THAT(refusal(bytes), HasSubstr(message)) << name;
}

// Three things the reference accepts, against the format's own specification.
TEST_F(SafetensorsTest, RefusesThreeThingsMore) {
  EXPECT_THAT(refusal(file_bytes(std::string("  ") + kValid, 8)), HasSubstr("does not begin with"));
  const std::string entry = R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  EXPECT_THAT(refusal(file_bytes("{\"a\":" + entry + ",\"a\":" + entry + "}", 4)),
              HasSubstr("\"a\" occurs twice"));
  EXPECT_THAT(refusal(file_bytes("{\"a\\u0000b\":" + entry + "}", 4)), HasSubstr("holds NUL"));
}

TEST_F(SafetensorsTest, AcceptsWhatTheReferenceAccepts) {
  EXPECT_EQ(open(file_bytes(kValid, 8))->read("a").sizes(), at::IntArrayRef({2}));
  EXPECT_TRUE(open(file_bytes(std::string(kValid) + "      ", 8))->has("a"));  // padded header
  EXPECT_EQ(
      open(file_bytes(R"({"e":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}})", 0))->read("e").numel(),
      0);
  EXPECT_EQ(open(file_bytes(R"({"s":{"dtype":"F64","shape":[],"data_offsets":[0,8]}})", 8))->read("s").dim(),
            0);
  EXPECT_EQ(open(file_bytes(R"({"b":{"dtype":"BOOL","shape":[3],"data_offsets":[0,3]}})", 3))
                ->read("b")
                .scalar_type(),
            at::kBool);
  EXPECT_EQ(open(file_bytes(R"({"f":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[0,2]}})", 2))
                ->read("f")
                .scalar_type(),
            at::kFloat8_e4m3fn);
  EXPECT_TRUE(open(file_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"more":[{"x":1}]}})", 1))
                  ->has("a"));
  EXPECT_TRUE(
      open(file_bytes(R"({"../a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 1))->has("../a"));
  EXPECT_TRUE(open(file_bytes("{}", 0))->names().empty());
}

TEST_F(SafetensorsTest, EveryTruncationIsRefused) {
  const std::string bytes = file_bytes(kValid, 8);
  for (size_t size = 0; size < bytes.size(); ++size)
    EXPECT_NE(refusal(bytes.substr(0, size)), "accepted") << size << " bytes";
}

TEST_F(SafetensorsTest, MisalignedDataAreReadAll) {
  // A header of odd length puts float32 on an odd address.
  std::string bytes = file_bytes(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]} })", 0);
  ASSERT_NE(bytes.size() % 4, 0u);
  const float value = 2.5f;
  bytes.append(reinterpret_cast<const char*>(&value), 4);
  EXPECT_EQ(open(bytes)->read("a").item<float>(), 2.5f);
}

TEST_F(SafetensorsTest, TensorsOutliveTheirSource) {
  write_safetensors(folder_ / "x.safetensors", {{"a", at::arange(1000, at::kFloat)}});
  const at::Tensor a = open_safetensors(folder_ / "x.safetensors")->read("a");
  fs::remove(folder_ / "x.safetensors");
  EXPECT_EQ(a.sum().item<float>(), 499500.0f);
}

TEST_F(SafetensorsTest, WritesWhatItReads) {
  const at::Tensor matrix = at::arange(6, at::kFloat).view({2, 3});
  const TensorList tensors = {{"bytes", at::arange(3, at::kByte)},
                              {"transposed", matrix.t()},
                              {"half", matrix.to(at::kHalf)},
                              {"scalar", at::scalar_tensor(7, at::kLong)},
                              {"empty", at::empty({0, 4})}};
  const fs::path file = folder_ / "x.safetensors";
  write_safetensors(file, tensors, {{"format", "pt"}, {"note", "ä\"\\"}});
  const auto source = open_safetensors(file);
  EXPECT_EQ(source->names().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    EXPECT_EQ(source->shape(name), tensor.sizes().vec());
    EXPECT_EQ(source->read(name).scalar_type(), tensor.scalar_type());
    EXPECT_TRUE(at::equal(source->read(name), tensor)) << name;
  }
  EXPECT_EQ(safetensors_metadata(file).at("note"), "ä\"\\");
  EXPECT_EQ(source->where("half"), file.string());
  EXPECT_THROW(source->read("absent"), CheckpointError);
  EXPECT_THROW(write_safetensors(file, {{"a", matrix}, {"a", matrix}}), Error);
}

TEST_F(SafetensorsTest, ConvertsFloatsAsItWrites) {
  write_safetensors(folder_ / "x.safetensors",
                    {{"f", at::full({2}, 1.001f)}, {"i", at::ones({2}, at::kLong)}}, {}, at::kBFloat16);
  const auto source = open_safetensors(folder_ / "x.safetensors");
  EXPECT_EQ(source->read("f").scalar_type(), at::kBFloat16);
  EXPECT_EQ(source->read("i").scalar_type(), at::kLong);
}

TEST_F(SafetensorsTest, FolderIsSplitIntoShards) {
  TensorList tensors;
  for (int i = 0; i < 5; ++i) tensors.emplace_back(fmt::format("t{}", i), at::full({10}, i, at::kFloat));
  write_weights_folder(folder_, tensors);
  EXPECT_TRUE(fs::exists(folder_ / "model.safetensors"));
  write_weights_folder(folder_, tensors, /*max_shard_bytes=*/80);  // two tensors of 40 bytes each
  EXPECT_FALSE(fs::exists(folder_ / "model.safetensors"));
  EXPECT_TRUE(fs::exists(folder_ / "model-00003-of-00003.safetensors"));
  const Json index = read_json(folder_ / "model.safetensors.index.json");
  EXPECT_EQ(index["metadata"]["total_size"], 200);
  EXPECT_EQ(index["weight_map"]["t4"], "model-00003-of-00003.safetensors");
  const auto source = open_weights_folder(folder_);
  EXPECT_EQ(source->names().size(), 5u);
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(at::equal(source->read(name), tensor));
  EXPECT_EQ(source->where("t2"), (folder_ / "model-00002-of-00003.safetensors").string());
}

TEST_F(SafetensorsTest, IndexThatLeadsElsewhereIsRefused) {
  write_safetensors(folder_ / "shard.safetensors", {{"a", at::ones({1})}});
  const auto refuse = [&](const Json& index) -> std::string {
    write_json(folder_ / "model.safetensors.index.json", index);
    try {
      open_weights_folder(folder_);
    } catch (const CheckpointError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refuse({{"weight_map", {{"a", "shard.safetensors"}}}}), "accepted");
  for (const char* name : {"../shard.safetensors", "/etc/passwd", "x/shard.safetensors", "..", ""})
    EXPECT_THAT(refuse({{"weight_map", {{"a", name}}}}), HasSubstr("not a plain file name")) << name;
  EXPECT_THAT(refuse({{"weight_map", {{"b", "shard.safetensors"}}}}),
              HasSubstr("tensor b is not in shard.safetensors"));
  EXPECT_THAT(refuse({{"weight_map", {{"a", "absent.safetensors"}}}}), HasSubstr("no such file"));
  EXPECT_THAT(refuse({{"weight_map", {{"a", 3}}}}), HasSubstr("expected a file name"));
  EXPECT_THAT(refuse({{"tensors", 1}}), HasSubstr("weight_map"));
}

TEST_F(SafetensorsTest, FolderWithoutWeightsSaysWhatItLookedFor) {
  const auto message = [&]() -> std::string {
    try {
      open_weights_folder(folder_);
    } catch (const CheckpointError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_THAT(message(), HasSubstr("holds neither model.safetensors nor pytorch_model.bin, nor an index"));
}

}  // namespace
}  // namespace caldera
