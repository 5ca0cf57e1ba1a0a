// Memory of tensors on the CPU, kept between steps.
#pragma once
#include <cstdint>

namespace caldera {

// From now on ATen's CPU tensors take their large blocks from one arena: what a step frees, the next one gets
// back without new page faults (up to a third of a step's time), on huge pages where the kernel grants them.
// What is free in it never makes up more than a fifth of what it holds in memory. Small blocks come from
// malloc as before, and so do all where the system refuses the arena its range of addresses, four times the machine's
// memory. Safe from all threads; tensors made before stay valid. Call it once, at the start.
void use_caching_cpu_allocator();

// Bytes of large blocks alive and kept free now, and the most that was alive at once.
struct CpuMemory {
  int64_t live_bytes = 0, cached_bytes = 0, peak_live_bytes = 0;
};
CpuMemory cpu_memory();

}  // namespace caldera
