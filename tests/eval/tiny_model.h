// A model small enough for tests: a CLIP tower of 32-pixel pictures (4 tokens each) and a two-layer LLaMA
// over bytes, with fresh weights, written as an HF folder.
#pragma once
#include <filesystem>
#include <opencv2/imgcodecs.hpp>
#include <string>

#include "base/files.h"
#include "base/json.h"
#include "data/tokenizer.h"
#include "model/weights/load.h"
#include "tests/support.h"

namespace caldera {

// GPT-2's alphabet: the character that stands for each byte in a byte-level vocabulary.
inline std::string byte_character(int byte) {
  const bool prints = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
  int code = byte;
  if (!prints) {
    code = 256;
    for (int other = 0; other < byte; ++other)
      if (!((other >= '!' && other <= '~') || (other >= 0xA1 && other <= 0xAC) || other >= 0xAE)) ++code;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

// One token a byte, then <s> 256, </s> 257, <pad> 258.
inline void write_byte_tokenizer(const fs::path& folder) {
  Json vocab = Json::object();
  for (int byte = 0; byte < 256; ++byte) vocab[byte_character(byte)] = byte;
  Json added = Json::array();
  int id = 256;
  for (const char* token : {"<s>", "</s>", "<pad>"}) {
    vocab[token] = id;
    added.push_back({{"id", id++},
                     {"content", token},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const Json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
  write_json(folder / "tokenizer.json",
             {{"version", "1.0"},
              {"added_tokens", added},
              {"normalizer", Json()},
              {"pre_tokenizer", byte_level},
              {"post_processor", Json()},
              {"decoder", byte_level},
              {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", Json::array()}}}});
  write_json(folder / "tokenizer_config.json", {{"bos_token", "<s>"},
                                                {"eos_token", "</s>"},
                                                {"pad_token", "<pad>"},
                                                {"add_bos_token", true},
                                                {"tokenizer_class", "PreTrainedTokenizerFast"}});
}

// vision/ and language/: configurations without weights, as a recipe may name them.
inline void write_tiny_parts(const fs::path& parts) {
  fs::create_directories(parts / "vision");
  fs::create_directories(parts / "language");
  write_json(parts / "vision" / "config.json", {{"model_type", "clip_vision_model"},
                                                {"hidden_size", 16},
                                                {"intermediate_size", 32},
                                                {"num_hidden_layers", 2},
                                                {"num_attention_heads", 2},
                                                {"image_size", 32},
                                                {"patch_size", 16},
                                                {"projection_dim", 16}});
  write_json(parts / "language" / "config.json", {{"model_type", "llama"},
                                                  {"architectures", {"LlamaForCausalLM"}},
                                                  {"hidden_size", 32},
                                                  {"intermediate_size", 64},
                                                  {"num_hidden_layers", 2},
                                                  {"num_attention_heads", 4},
                                                  {"num_key_value_heads", 2},
                                                  {"vocab_size", 259},
                                                  {"max_position_embeddings", 512},
                                                  {"rms_norm_eps", 1e-5},
                                                  {"rope_theta", 10000.0},
                                                  {"hidden_act", "silu"},
                                                  {"tie_word_embeddings", false}});
  write_byte_tokenizer(parts / "language");
}

inline void write_tiny_model(const fs::path& folder) {
  const fs::path parts = folder.string() + "-parts";
  write_tiny_parts(parts);
  const auto model = build_llava({.vision_tower = (parts / "vision").string(),
                                  .language_model = (parts / "language").string(),
                                  .seed = 1});
  write_folder_atomic(folder, [&](const fs::path& out) {
    const int64_t image_token_id = load_tokenizer(parts / "language")->save(out, "");
    save_hf_llava(
        *model, {.conversation_template = "v1"},
        {.image_token_id = image_token_id, .bos_token_id = 256, .eos_token_id = 257, .pad_token_id = 258},
        out);
  });
  fs::remove_all(parts);
}

// images/red.png, images/blue.png; test.json asks for their colours.
inline void write_tiny_data(const fs::path& folder) {
  fs::create_directories(folder / "images");
  cv::imwrite((folder / "images" / "red.png").string(), cv::Mat(40, 48, CV_8UC3, cv::Scalar(20, 20, 220)));
  cv::imwrite((folder / "images" / "blue.png").string(), cv::Mat(40, 48, CV_8UC3, cv::Scalar(220, 20, 20)));
  Json records = Json::array();
  int number = 0;
  for (const char* colour : {"red", "blue"})
    for (const char* question : {"Which colour?", "Is it red?"}) {
      const bool is_colour = std::string(question) == "Which colour?";
      records.push_back({{"id", fmt::format("q{}", number++)},
                         {"image", fmt::format("{}.png", colour)},
                         {"type", is_colour ? "colour" : "yes_no"},
                         {"held_out", std::string(colour) == "blue"},
                         {"conversations",
                          {{{"from", "human"}, {"value", fmt::format("<image>\n{}", question)}},
                           {{"from", "gpt"},
                            {"value", is_colour                      ? colour
                                      : std::string(colour) == "red" ? "yes"
                                                                     : "no"}}}}});
    }
  write_json(folder / "test.json", records);
}

}  // namespace caldera
