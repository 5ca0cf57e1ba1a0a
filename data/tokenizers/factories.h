// How load_tokenizer makes each kind of tokenizer.
#pragma once
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/gguf.h"
#include "data/tokenizer.h"
#include "data/tokenizers/byte_level_bpe.h"
#include "data/tokenizers/hf_config.h"
#include "data/tokenizers/sentencepiece_model.h"

namespace caldera {

// HF's (slow) LlamaTokenizer: SentencePiece pieces, "legacy", "add_bos_token" and "add_prefix_space" from the
// configuration. `model` holds the bytes of a tokenizer.model; `where` names it in errors.
std::unique_ptr<Tokenizer> make_sentencepiece_tokenizer(std::string model, TokenizerConfig config,
                                                        const std::string& where);

std::unique_ptr<Tokenizer> make_byte_level_bpe_tokenizer(BpeModel model, TokenizerConfig config,
                                                         const std::string& where);

// The same for a model of characters (BpeModel::characters).
std::unique_ptr<Tokenizer> make_character_bpe_tokenizer(BpeModel model, TokenizerConfig config,
                                                        const std::string& where);
// Throws CheckpointError where a token that the configuration names is not in the vocabulary.
void check_named_tokens(const Tokenizer& tokenizer, const TokenizerConfig& config, bool adds_bos,
                        const std::string& where);

// A tokenizer.json of the byte-level BPE kind (GPT-2, SmolLM2, Qwen2, LLaMA 3), or of the SentencePiece kind
// (LLaMA, Mistral, by transformers). The added tokens go to `config`.
BpeModel read_tokenizer_json(const std::filesystem::path& file, TokenizerConfig& config);
// What a tokenizer.json knows, without a look at how it cuts texts: any kind will do.
struct TokenizerJsonOutline {
  bool is_byte_level = false;
  int64_t num_tokens = 0;  // of its model: one past the largest id, added tokens left out
  std::vector<AddedToken> added_tokens;
};
TokenizerJsonOutline outline_of_tokenizer_json(const std::filesystem::path& file);

void write_tokenizer_json(const std::filesystem::path& file, const BpeModel& model,
                          const TokenizerConfig& config, int64_t bos_id);

struct SentencePieceFlags {
  bool legacy = true, add_bos = true, add_prefix = true;
  int64_t bos_id = -1;
};
// The tokenizer.json of a SentencePiece BPE model, for programs that read no tokenizer.model, or that guess
// the order of its merges by ids (transformers 5 does: "▁▁" has a low id in LLaMA's model and the lowest
// score).
void write_sentencepiece_json(const std::filesystem::path& file, const std::vector<Piece>& pieces,
                              const TokenizerConfig& config, const SentencePieceFlags& flags);

// The pre-tokenizers of byte-level BPE that are known by the names llama.cpp gives them (tokenizer.ggml.pre).
struct GgufPreset {
  const char* name;
  std::vector<SplitStep> steps;
  bool nfc, ignore_merges, adds_bos;
};
const std::vector<GgufPreset>& gguf_presets();

// One token of a vocabulary for GGUF: the pieces of a model, the added tokens laid over, unused ones up to
// `vocab_size`; added tokens beyond it are left out.
std::vector<Piece> gguf_vocabulary(std::vector<Piece> pieces, const std::vector<AddedToken>& added_tokens,
                                   int64_t vocab_size);
// The lists of tokens and types, and the ids of the special tokens (-1: none).
struct SpecialIds {
  int64_t bos = -1, eos = -1, unknown = -1, padding = -1;
  bool adds_bos = false;
};
GgufFields gguf_vocabulary_fields(const char* model, const std::string& pre, const std::vector<Piece>& vocabulary,
                                  const SpecialIds& ids);

// The tokenizer in a GGUF file's metadata: tokenizer.ggml.model "gpt2" (byte-level BPE) or "llama"
// (SentencePiece).
std::unique_ptr<Tokenizer> make_gguf_tokenizer(const GgufFile& file);

}  // namespace caldera
