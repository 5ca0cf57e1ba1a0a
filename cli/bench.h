// The parts of `caldera bench` that have a file of their own.
#pragma once
#include <cstdint>

namespace caldera {

// Prints a table of the speed of matrix products; each number is the median of so many rounds.
void bench_products(int64_t rounds);

}  // namespace caldera
