#include <fstream>

#include "base/error.h"
#include "base/files.h"
#include "data/tokenizers/factories.h"

namespace caldera {

std::unique_ptr<Tokenizer> load_tokenizer(const fs::path& path) {
  if (fs::is_regular_file(path)) {
    char magic[4] = {};
    std::ifstream(path, std::ios::binary).read(magic, sizeof(magic));
    CALDERA_CHECK(std::string_view(magic, sizeof(magic)) == "GGUF", CheckpointError,
                  "{}: not a GGUF file; expected one, or a folder with tokenizer.model or tokenizer.json",
                  path.string());
    return make_gguf_tokenizer(GgufFile(path));
  }
  CALDERA_CHECK(
      fs::is_directory(path), CheckpointError,
      "{}: no such file or folder; expected a folder with tokenizer.model or tokenizer.json, or a GGUF file",
      path.string());
  const fs::path model = path / "tokenizer.model", json = path / "tokenizer.json";
  if (fs::exists(model))
    return make_sentencepiece_tokenizer(read_file(model), read_tokenizer_config(path), model.string());
  CALDERA_CHECK(fs::exists(json), CheckpointError,
                "{}: no tokenizer here; expected tokenizer.model (SentencePiece) or tokenizer.json",
                path.string());
  TokenizerConfig config = read_tokenizer_config(path);
  BpeModel bpe = read_tokenizer_json(json, config);
  return make_byte_level_bpe_tokenizer(std::move(bpe), std::move(config), json.string());
}

}  // namespace caldera
