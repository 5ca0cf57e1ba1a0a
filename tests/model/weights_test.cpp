// Components from folders and GGUF files; goldens by scripts/make_goldens_gguf.py.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.h"
#include "model/weights/gguf_weights.h"
#include "model/weights/load.h"
#include "tests/aten.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;


class WeightsTest : public testing::Test {
 protected:
  TemporaryFolder temporary_;
  const fs::path folder_ = temporary_.path();

  const Json clip_config_ = {{"model_type", "clip_vision_model"},
                             {"hidden_size", 24},
                             {"intermediate_size", 40},
                             {"num_hidden_layers", 3},
                             {"num_attention_heads", 3},
                             {"image_size", 30},
                             {"patch_size", 7}};
  const Json llama_config_ = {{"model_type", "llama"},    {"hidden_size", 32},
                              {"intermediate_size", 48},  {"num_hidden_layers", 2},
                              {"num_attention_heads", 4}, {"num_key_value_heads", 2},
                              {"vocab_size", 50},         {"max_position_embeddings", 64}};

  // The tensors of a component as a list to write, names changed by `rename` ("" drops one).
  static TensorList list(const NamedTensors& tensors,
                         const std::function<std::string(const std::string&)>& rename) {
    TensorList result;
    for (const NamedTensor& named : tensors)
      if (const std::string name = rename(named.name); !name.empty())
        result.emplace_back(name, named.value());
    return result;
  }
  static void expect_equal(const NamedTensors& a, const NamedTensors& b) {
    ASSERT_EQ(a.size(), b.size());
    for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i].value(), b[i].value())) << a[i].name;
  }
};

const auto kSame = [](const std::string& name) { return name; };

at::Tensor next_token_logits(LanguageModel& model, const at::Tensor& ids) {
  const at::NoGradGuard no_grad;
  const int64_t num_tokens = ids.size(0);
  const at::Tensor hidden =
      model.forward(model.embed(ids), at::arange(num_tokens, at::kLong), {0, num_tokens}, {});
  return at::linear(hidden, model.head_weight());
}

TEST(GgufWeights, AreWhatTransformersReads) {
  const GgufDecoder decoder = open_gguf_decoder(kGolden / "llama_tiny.gguf");
  const auto expected = open_safetensors(kGolden / "llama_tiny_expected.safetensors");
  EXPECT_EQ(decoder.weights->names().size(), 20u);
  for (const std::string& name : decoder.weights->names()) {
    at::Tensor got = decoder.weights->read(name);
    EXPECT_EQ(got.sizes().vec(), decoder.weights->shape(name));
    const at::Tensor half = expected->read(name);  // the file keeps half of each matrix
    EXPECT_TRUE(at::equal(got.narrow(0, 0, half.size(0)).to(at::kFloat), half)) << name;
  }
  EXPECT_EQ(decoder.config["num_key_value_heads"], 2);
  EXPECT_EQ(decoder.config["intermediate_size"], 96);
  EXPECT_EQ(decoder.config["vocab_size"], 40);
  EXPECT_EQ(decoder.config["rope_theta"], 12345.0);
  EXPECT_EQ(decoder.config["tie_word_embeddings"], true);
  EXPECT_EQ(decoder.config["eos_token_id"], 2);
  EXPECT_NEAR(decoder.config["rms_norm_eps"].get<double>(), 1e-5, 1e-12);
}

TEST(GgufWeights, ModelSpeaksAsTransformersDoes) {
  const auto model = load_language_model(kGolden / "llama_tiny.gguf");
  const auto expected = open_safetensors(kGolden / "llama_tiny_expected.safetensors");
  const at::Tensor logits = next_token_logits(*model, expected->read("ids"));
  EXPECT_LT((logits - expected->read("logits")).abs().max().item<float>(), 2e-5f);
}

TEST(GgufWeights, UnsupportedTypeIsNamed) {
  const std::vector<std::byte> bytes(144);
  const GgufTensor tensor{"blk.0.attn_q.weight", {1, 256}, 10, bytes};
  EXPECT_THAT(error_of<CheckpointError>([&] { dequantize(tensor, "x.gguf"); }),
              HasSubstr("x.gguf: blk.0.attn_q.weight: ggml type 10 is not supported"));
}

// Goldens by scripts/make_goldens_gguf_quants.py.
TEST(GgufWeights, QuantisedTypesAreTheReferencesBitForBit) {
  const std::map<std::string, uint32_t> types = {{"Q4_0", 2}, {"Q4_1", 3},  {"Q5_0", 6},  {"Q5_1", 7},
                                                 {"Q8_0", 8}, {"Q4_K", 12}, {"Q5_K", 13}, {"Q6_K", 14}};
  const auto expected = open_safetensors(kGolden / "gguf_quants.safetensors");
  for (const auto& [name, type] : types) {
    const at::Tensor bytes = expected->read(name + ".bytes"), values = expected->read(name + ".values");
    const GgufTensor tensor{"x",
                            values.sizes().vec(),
                            type,
                            {static_cast<const std::byte*>(bytes.const_data_ptr()), bytes.nbytes()}};
    EXPECT_TRUE(at::equal(dequantize(tensor, "x"), values)) << name;
  }
}

// A copy of the golden file with one stretch of bytes replaced by another of the same length.
TEST_F(WeightsTest, GgufThatLiesIsRefused) {
  const auto load_changed = [&](const std::string& from, const std::string& to, size_t occurrence = 0) {
    std::string bytes = read_file(kGolden / "llama_tiny.gguf");
    size_t at = bytes.find(from);
    for (; occurrence > 0; --occurrence) at = bytes.find(from, at + 1);
    bytes.replace(at, from.size(), to);
    write_file_atomic(folder_ / "x.gguf", bytes);
    return error_of<CheckpointError>([&] { load_language_model(folder_ / "x.gguf"); });
  };
  const auto number = [](const std::string& key, uint32_t value) {
    const uint32_t type = 4;
    return key + std::string(reinterpret_cast<const char*>(&type), 4) +
           std::string(reinterpret_cast<const char*>(&value), 4);
  };
  EXPECT_EQ(load_changed("tiny", "tina"), "accepted");
  EXPECT_THAT(load_changed(number("llama.block_count", 2), number("llama.block_count", 1u << 29)),
              HasSubstr("blk.536870911.ffn_gate.weight is missing"));
  EXPECT_THAT(load_changed(number("llama.block_count", 2), number("llama.block_count", 1)),
              HasSubstr("has no place in the model"));
  EXPECT_THAT(load_changed(number("llama.embedding_length", 64), number("llama.embedding_length", 1u << 20)),
              HasSubstr("expected shape [40, 1048576], got [40, 64]"));
  EXPECT_THAT(load_changed(number("llama.attention.head_count", 4), number("llama.attention.head_count", 0)),
              HasSubstr("expected a positive size, got 0"));
  EXPECT_THAT(load_changed(number("llama.attention.head_count", 4), number("llama.attention.head_count", 8)),
              HasSubstr("rope.dimension_count"));
  EXPECT_THAT(load_changed("llama.feed_forward_length", "llama.feed_forward_lengt_"),
              HasSubstr("no metadata key llama.feed_forward_length"));
  EXPECT_THAT(load_changed("blk.1.attn_k.weight", "blk.1.attn_x.weight"),
              HasSubstr("has no place in architecture"));
  EXPECT_THAT(load_changed("blk.1.attn_norm.weight", "blk.7.attn_norm.weight"),
              HasSubstr("1 of 20 tensors are missing"));
  const std::string architecture = std::string("\5\0\0\0\0\0\0\0llama", 13);
  EXPECT_THAT(load_changed(architecture, std::string("\5\0\0\0\0\0\0\0lxama", 13)),
              HasSubstr("general.architecture: expected one of llama, qwen2, qwen3, got lxama"));
}

// A real model: CALDERA_GGUF names a llama's .gguf, CALDERA_GGUF_EXPECTED a safetensors file with "ids" and
// transformers' "nll" of each next token (tests/parity/gguf_nll.py makes it).
TEST(GgufWeights, RealModel) {
  const char* file = std::getenv("CALDERA_GGUF");
  const char* expected_file = std::getenv("CALDERA_GGUF_EXPECTED");
  if (file == nullptr || expected_file == nullptr)
    GTEST_SKIP() << "CALDERA_GGUF or CALDERA_GGUF_EXPECTED is not set";
  const auto model = load_language_model(file);
  const auto expected = open_safetensors(expected_file);
  const at::Tensor ids = expected->read("ids");
  const at::Tensor logits = next_token_logits(*model, ids);
  const int64_t num_targets = ids.size(0) - 1;
  const at::Tensor nll = -at::log_softmax(logits.narrow(0, 0, num_targets), 1)
                              .gather(1, ids.narrow(0, 1, num_targets).unsqueeze(1))
                              .squeeze(1);
  EXPECT_LT((nll - expected->read("nll")).abs().max().item<float>(), 1e-3f);
  std::printf("perplexity %.4f\n", std::exp(nll.mean().item<double>()));
}

TEST_F(WeightsTest, ClipFolderInEveryLayout) {
  write_json(folder_ / "config.json", clip_config_);
  const auto fresh = load_vision_tower(folder_, {}, 3);
  const auto again = load_vision_tower(folder_, {}, 3);
  expect_equal(fresh->tensors(), again->tensors());
  EXPECT_THAT(error_of<CheckpointError>([&] { load_vision_tower(folder_, {}); }),
              HasSubstr("holds neither model.safetensors"));

  const std::vector<std::function<std::string(const std::string&)>> layouts = {
      kSame, [](const std::string& name) { return name.substr(std::string("vision_model.").size()); }};
  for (const auto& layout : layouts) {
    TensorList tensors = list(fresh->tensors(), layout);
    tensors.emplace_back(layout("vision_model.embeddings.position_ids"), at::arange(17, at::kLong));
    write_weights_folder(folder_, tensors);
    expect_equal(load_vision_tower(folder_, {})->tensors(), fresh->tensors());
  }
  // A CLIPModel: both towers in one file, this one's configuration inside the whole's.
  TensorList both = list(fresh->tensors(), kSame);
  both.emplace_back("text_model.embeddings.token_embedding.weight", at::ones({3, 4}));
  both.emplace_back("logit_scale", at::ones({}));
  write_weights_folder(folder_, both);
  write_json(folder_ / "config.json", {{"model_type", "clip"}, {"vision_config", clip_config_}});
  expect_equal(load_vision_tower(folder_, {})->tensors(), fresh->tensors());
}

TEST_F(WeightsTest, MissingMisshapenAndForeignTensorsAreNamed) {
  write_json(folder_ / "config.json", clip_config_);
  const auto fresh = load_vision_tower(folder_, {}, 3);
  const std::string file = (folder_ / "model.safetensors").string();
  const auto load = [&] { load_vision_tower(folder_, {}); };

  write_weights_folder(folder_, list(fresh->tensors(), [](const std::string& name) {
                         return name.find("layers.1.") == std::string::npos ? name : "";
                       }));
  EXPECT_THAT(error_of<CheckpointError>(load),
              testing::AllOf(HasSubstr(file), HasSubstr("16 of 55 tensors are missing"),
                             HasSubstr("vision_model.encoder.layers.1.self_attn.q_proj.weight, "),
                             HasSubstr(", ...")));

  TensorList tensors = list(fresh->tensors(), kSame);
  tensors[0].second = at::ones({25});
  write_weights_folder(folder_, tensors);
  EXPECT_EQ(error_of<CheckpointError>(load),
            file + ": vision_model.embeddings.class_embedding: expected shape [24], got [25]");

  tensors[0].second = at::ones({24}, at::kChar);
  write_weights_folder(folder_, tensors);
  EXPECT_THAT(error_of<CheckpointError>(load), HasSubstr("expected floating-point weights, got Char"));

  tensors[0].second = at::ones({24}, at::kHalf);  // another float is converted
  tensors.emplace_back("vision_model.encoder.layers.9.layer_norm1.weight", at::ones({24}));
  write_weights_folder(folder_, tensors);
  EXPECT_THAT(error_of<CheckpointError>(load),
              HasSubstr("layers.9.layer_norm1.weight has no place in the model"));

  write_file_atomic(folder_ / "config.json", "{");
  EXPECT_THAT(error_of<CheckpointError>(load), HasSubstr("config.json: not valid JSON"));
  write_file_atomic(folder_ / "config.json", "{}");
  EXPECT_THAT(error_of<CheckpointError>(load), HasSubstr("unknown vision tower model_type \"\""));
  fs::remove(folder_ / "config.json");
  EXPECT_THAT(error_of<CheckpointError>(load), HasSubstr("config.json: no such file"));
}

TEST_F(WeightsTest, LlamaFolder) {
  write_json(folder_ / "config.json", llama_config_);
  const auto fresh = load_language_model(folder_, 5);
  TensorList tensors = list(fresh->tensors(), kSame);
  tensors.emplace_back("model.layers.0.self_attn.rotary_emb.inv_freq", at::ones({4}));
  write_weights_folder(folder_, tensors, /*max_shard_bytes=*/10000);
  EXPECT_TRUE(fs::exists(folder_ / "model.safetensors.index.json"));
  expect_equal(load_language_model(folder_)->tensors(), fresh->tensors());

  tensors.emplace_back("model.layers.2.mlp.up_proj.weight", at::ones({4}));
  write_weights_folder(folder_, tensors);
  EXPECT_THAT(error_of<CheckpointError>([&] { load_language_model(folder_); }),
              HasSubstr("layers.2.mlp.up_proj.weight has no place"));
}

TEST_F(WeightsTest, TiedHeadInTheFile) {
  Json config = llama_config_;
  config["tie_word_embeddings"] = true;
  write_json(folder_ / "config.json", config);
  const auto fresh = load_language_model(folder_, 5);
  TensorList tensors = list(fresh->tensors(), kSame);
  tensors.emplace_back("lm_head.weight", fresh->head_weight());  // torch's files hold it twice
  write_weights_folder(folder_, tensors);
  EXPECT_EQ(load_language_model(folder_)->config()["tie_word_embeddings"], true);
  // Where the two differ, transformers keeps both.
  tensors.back().second = at::ones({50, 32});
  write_weights_folder(folder_, tensors);
  const auto loaded = load_language_model(folder_);
  EXPECT_EQ(loaded->config()["tie_word_embeddings"], false);
  EXPECT_TRUE(at::equal(loaded->head_weight(), at::ones({50, 32})));
  EXPECT_TRUE(at::equal(loaded->tensors()[0].value(), fresh->tensors()[0].value()));
}

}  // namespace
}  // namespace caldera
