#include "base/error.h"

namespace caldera {

void assert_failed(const char* expression, const char* file, int line) {
  throw Error(fmt::format("internal error: {} does not hold at {}:{}; please report this", expression, file, line));
}

}  // namespace caldera
