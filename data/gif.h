// GIF pictures: the first frame, as PIL shows it.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "data/image.h"

namespace caldera {

struct GifSize {
  int64_t height = 0, width = 0;  // pixels
};

// The size of the screen, grown where the first frame is larger, as PIL grows it. Walks the file's blocks up
// to the first frame's end. Throws DataError "WHERE: ..." where they are cut off or there is no frame.
GifSize probe_gif(std::string_view bytes, const std::string& where);

// The first frame. What it does not cover has the colour of the transparent index, else of index 0;
// transparency is dropped. Throws DataError for data that give fewer pixels than the frame has.
Image decode_gif(std::string_view bytes, const std::string& where);

}  // namespace caldera
