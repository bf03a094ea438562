// The environment variables, read anew by every call: programs change them as they run.
#pragma once

#include <cstdint>
#include <string>

namespace orchard {

/// Whether a variable is on: 1, true, yes or on. Unset, empty, 0, false, no and off are off, and
/// capitals and spaces around make no difference. Anything else raises.
/// src/orchard_ops/environment.py has the same rule.
bool switched_on(const char* name);

/// ORCHARD_DEBUG or its older name.
bool debug_enabled();

/// PYTORCH_MPS_FAST_MATH, which PyTorch reads. Anything but 0 or an empty value is taken to be on,
/// since the opposite mistake would give wrong numbers.
bool torch_fast_math();

/// The memory that a backward may take for dS. 0 is the low-memory mode.
int64_t scratch_bytes();

/// The tiles to take instead of the plan's. Only those of the forward can be chosen.
std::string chosen_tiles();

}  // namespace orchard
