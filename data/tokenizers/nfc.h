// Unicode's composed normal form (NFC), which Qwen2's tokenizers apply first.
#pragma once
#include "data/tokenizers/utf8.h"

namespace caldera {

// The text in NFC. A character that was composed comes from its first part's place.
MappedText compose_nfc(MappedText text);

}  // namespace caldera
