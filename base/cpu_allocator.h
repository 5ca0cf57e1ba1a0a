// Memory of tensors on the CPU, kept between steps.
#pragma once
#include <cstdint>

namespace caldera {

// From now on ATen's CPU tensors take their large blocks from one arena: what a step frees, the next one gets
// back without new page faults (up to a third of a step's time), on huge pages where the kernel grants them.
// What it holds in memory never exceeds 1.25 times what was alive at once since settle_cpu_memory(). Small
// blocks come from malloc as before, and so do all where the system refuses the arena its range of addresses,
// four times the machine's memory. Safe from all threads; tensors made before stay valid. Call it once, at
// the start.
void use_caching_cpu_allocator();

// To be called when what is alive now will stay and what was freed will not come back, as after a model was
// loaded: what is free beyond a quarter of what is alive goes back to the system, and the bound on it follows
// what is alive from now on.
void settle_cpu_memory();

// Bytes of large blocks alive and kept free now, and the most that was alive at once.
struct CpuMemory {
  int64_t live_bytes = 0, cached_bytes = 0, peak_live_bytes = 0;
};
CpuMemory cpu_memory();

}  // namespace caldera
