// The MPS kernels of orchard::flash_attn_fwd and orchard::flash_attn_bwd, and what is asked about
// them. Boxed: each takes its arguments from the dispatcher's stack and puts its results there.
#pragma once

#include <torch/csrc/stable/library.h>

namespace orchard {

void flash_attn_fwd(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void flash_attn_bwd(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

/// The plan of a forward and its backward, for explain(): runs nothing, reads no data.
void flash_attn_plan(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

/// Calls that have run as Metal kernels: forward, backward, decode, and those of flex.
void metal_calls(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

}  // namespace orchard
