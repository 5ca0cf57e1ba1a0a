// The same work on each of many records.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace caldera {

// Calls work(0) to work(count - 1), in as many threads as there are processors. `progress`, in the calling
// thread, is told how many are done before every few hundred of them, the first ones too. What work throws
// comes out, the error of the smallest index.
void for_each_index(size_t count, const std::function<void(size_t)>& work,
                    const std::function<void(int64_t)>& progress = {});

}  // namespace caldera
