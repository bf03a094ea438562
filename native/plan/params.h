// What a plan passes to its kernels.
#pragma once

#include "problem.h"

namespace orchard {

TensorStrides to_strides(const std::array<int64_t, 4>& strides);

/// A window as the params have it: ORCHARD_WINDOW_OPEN where it is open.
int32_t clamp_window(int64_t window);

/// Whether the map of what the mask lets through is also one of key_ranges: where rows of the mask
/// differ, the two may hide a key together.
bool map_has_ranges(const Problem& problem);

/// Sizes of that map: (outer, inner, Hq, blocks of queries, blocks of keys), 1 where it is the same
/// for all.
std::array<int64_t, 5> mask_map_sizes(const Problem& problem);

/// The params that follow from the problem alone.
void fill_params(const Problem& problem, AttentionParams& params);

/// Whether rows of x start at multiples of 16 bytes, with adjacent columns that fill whole 16-byte
/// chunks.
bool allows_chunks(const Layout& x, int element_size);

/// What to say about a call whose rows do not.
void advise_on_layout(bool chunks, Plan& plan);

}  // namespace orchard
