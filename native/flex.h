// The MPS kernels of orchard::flex_attn_fwd and orchard::flex_attn_bwd: attention whose scores are
// given as functions. Boxed, as in attention.h.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace orchard {

void flex_attn_fwd(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);
void flex_attn_bwd(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

/// The plan of a forward and its backward: runs nothing, reads no data.
void flex_attn_plan(StableIValue* stack, uint64_t num_arguments, uint64_t num_results);

/// As their schemas have them. That of the plan is the forward's.
std::string flex_forward_arguments();
std::string flex_backward_arguments();

/// Calls that have run as Metal kernels.
int64_t metal_flex_forwards();
int64_t metal_flex_backwards();

}  // namespace orchard
