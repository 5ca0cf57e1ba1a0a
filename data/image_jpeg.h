// JPEG by libjpeg-turbo, set as PIL sets it.
#pragma once
#include <string>
#include <string_view>

#include "data/image.h"
#include "data/image_format.h"

namespace caldera {

// The pixels that PIL's convert("RGB") gives, CMYK included. `header` is what probe_image says of these
// bytes. Throws DataError "WHERE: ..." for data that cannot be decoded, or of more than 100 scans (time grows
// with them); like PIL, lets what libjpeg merely warns of pass.
Image decode_jpeg(std::string_view bytes, const ImageHeader& header, const std::string& where);

}  // namespace caldera
