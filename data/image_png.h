// PNG by libpng, whose words on broken files would go to the terminal otherwise.
#pragma once
#include <string>
#include <string_view>

#include "data/image.h"
#include "data/image_format.h"

namespace caldera {

// The pixels that PIL's convert("RGB") gives: alpha dropped, 16 bits as their high byte, but grey ones
// clipped at 255. `header` is what probe_image says of these bytes. Throws DataError "WHERE: ..." for data
// that cannot be decoded.
Image decode_png(std::string_view bytes, const ImageHeader& header, const std::string& where);

}  // namespace caldera
