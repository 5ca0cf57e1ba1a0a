#include <fstream>

#include "base/error.h"
#include "base/files.h"
#include "data/tokenizers/factories.h"

namespace caldera {
namespace {

std::unique_ptr<Tokenizer> load_json(const fs::path& json, TokenizerConfig config) {
  BpeModel bpe = read_tokenizer_json(json, config);
  return bpe.characters ? make_character_bpe_tokenizer(std::move(bpe), std::move(config), json.string())
                        : make_byte_level_bpe_tokenizer(std::move(bpe), std::move(config), json.string());
}

}  // namespace

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
  if (fs::exists(model)) {
    TokenizerConfig config = read_tokenizer_config(path);
    std::string bytes = read_file(model);
    if (fs::exists(json)) {
      // It may know more: tokens added later, or another model than this one was.
      TokenizerJsonOutline outline = outline_of_tokenizer_json(json);
      if (outline.is_byte_level ||
          outline.num_tokens > check_sentencepiece_model(bytes, model.string()).num_pieces)
        return load_json(json, std::move(config));
      for (AddedToken& token : outline.added_tokens) config.add(std::move(token));
    }
    return make_sentencepiece_tokenizer(std::move(bytes), std::move(config), model.string());
  }
  CALDERA_CHECK(fs::exists(json), CheckpointError,
                "{}: no tokenizer here; expected tokenizer.model (SentencePiece) or tokenizer.json",
                path.string());
  return load_json(json, read_tokenizer_config(path));
}

}  // namespace caldera
