// How load_tokenizer makes each kind of tokenizer.
#pragma once
#include <filesystem>
#include <memory>
#include <string>

#include "base/gguf.h"
#include "data/tokenizer.h"
#include "data/tokenizers/byte_level_bpe.h"
#include "data/tokenizers/hf_config.h"

namespace caldera {

// HF's (slow) LlamaTokenizer: SentencePiece pieces, "legacy", "add_bos_token" and "add_prefix_space" from the
// configuration. `model` holds the bytes of a tokenizer.model; `where` names it in errors.
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(std::string model, TokenizerConfig config,
                                                        const std::string& where);

std::unique_ptr<Tokenizer> make_byte_level_bpe_tokenizer(BpeModel model, TokenizerConfig config,
                                                         const std::string& where);

// A tokenizer.json of the byte-level BPE kind (GPT-2, SmolLM2, Qwen2, LLaMA 3). The added tokens go to
// `config`.
BpeModel read_tokenizer_json(const std::filesystem::path& file, TokenizerConfig& config);
void write_tokenizer_json(const std::filesystem::path& file, const BpeModel& model,
                          const TokenizerConfig& config);

// The tokenizer in a GGUF file's metadata: tokenizer.ggml.model "gpt2" (byte-level BPE) or "llama"
// (SentencePiece).
std::unique_ptr<Tokenizer> make_gguf_tokenizer(const GgufFile& file);

}  // namespace caldera
