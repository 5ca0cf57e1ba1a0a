// Several texts in one, as the ranks of a run send them.
#pragma once
#include <string>
#include <vector>

namespace caldera {

std::string pack_texts(const std::vector<std::string>& texts);
// What pack_texts packed. Throws DistributedError for anything else.
std::vector<std::string> unpack_texts(const std::string& packed);

}  // namespace caldera
