#pragma once
#include <string>

namespace caldera {

// This machine's name, for messages and files; "?" where the system does not say it.
std::string host_name();

}  // namespace caldera
