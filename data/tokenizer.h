// Tokenizers: text to ids and back. Text from data never becomes a control token: encode() treats "</s>", "<image>" and
// the like as plain characters; control tokens enter by id alone, from templates. Added tokens that their files do not
// call special ("<think>") are one id, as in HF's tokenizers.
#pragma once
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/gguf_writer.h"

namespace caldera {

struct Token {
  int64_t id = 0;
  int64_t begin = 0, end = 0;  // bytes of the encoded text that it covers; a piece that stands for no byte has begin == end
};

// What stands before a piece of text, which decides SentencePiece's dummy prefix as HF's tokenizers do.
enum class TextContext {
  kStart,         // start of a text, or right after an image placeholder: LLaVA tokenises each chunk by itself
  kAfterControl,  // right after a control token such as </s>: prefix in legacy mode only
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // Tokens of the text with the bytes each covers, in order. No BOS. Invalid UTF-8 is replaced (U+FFFD).
  virtual std::vector<Token> encode(std::string_view text, TextContext context = TextContext::kStart) const = 0;
  // Text of the ids; control tokens are left out.
  virtual std::string decode(std::span<const int64_t> ids) const = 0;
  // The id of a token by its exact text ("</s>", "<|im_end|>"), control tokens included; -1 if there is none.
  virtual int64_t token_id(std::string_view token) const = 0;
  // Whether white space behind the token belongs to it (HF's rstrip): a text that follows begins without.
  virtual bool takes_space_behind(int64_t) const { return false; }
  virtual int64_t vocab_size() const = 0;  // one past the largest id
  virtual int64_t bos_id() const = 0;      // -1 where there is none
  virtual int64_t eos_id() const = 0;
  virtual int64_t pad_id() const = 0;      // -1 where there is none
  virtual bool adds_bos() const = 0;       // HF's add_bos_token: whether a text's ids begin with BOS
  virtual const std::string& chat_template() const = 0;  // Jinja source; "" where there is none
  // Writes the files from which HF and load_tokenizer read the same tokenizer, with kImagePlaceholder added as a special token
  // where the vocabulary lacks it (unless told not to). Returns that token's id, or the one it would have.
  virtual int64_t save(const std::filesystem::path& folder, const std::string& chat_template,
                       bool add_image_token = true) const = 0;
  // The same tokenizer as llama.cpp finds it in a GGUF file ("tokenizer.ggml.*"), for a model whose vocabulary has
  // `vocab_size` rows: as many tokens, unused ones where there are fewer. Throws ConfigError saying why where llama.cpp has
  // no such tokenizer.
  virtual GgufFields gguf_fields(int64_t vocab_size) const = 0;
};

// A folder (tokenizer.model, or tokenizer.json; flags from tokenizer_config.json: "legacy" as in HF, absent means
// legacy) or a GGUF file (its metadata). Throws CheckpointError naming what was looked for.
std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& path);

}  // namespace caldera
