#include "machine.h"

#include <atomic>

namespace orchard {
namespace {

std::atomic<int64_t> gpu_cores{Machine().gpu_cores};
std::atomic<int64_t> scratch_bytes{Machine().scratch_bytes};

}  // namespace

void set_machine(int64_t cores, int64_t bytes) {
  gpu_cores = cores;
  scratch_bytes = bytes;
}

Machine machine() { return {gpu_cores, scratch_bytes}; }

}  // namespace orchard
