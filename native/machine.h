// The machine that calls run on, as Python describes it to the library when it loads it
// (src/orchard_ops/gpu.py).
#pragma once

#include <cstdint>

namespace orchard {

struct Machine {
  int64_t gpu_cores = 8;                ///< of the smallest GPU
  int64_t scratch_bytes = 256LL << 20;  ///< what a backward may take for dS unless the user says
};

/// Python calls it once, before any plan.
void set_machine(int64_t gpu_cores, int64_t scratch_bytes);

Machine machine();

}  // namespace orchard
