// What the kernels of a backward take, estimated: by it the plan chooses whether dS is stored.
#pragma once

#include "dscore_scratch.h"

namespace orchard {

/// The time of dk, dv and dq by the launches of a division, in the time that one core of the GPU
/// takes for dk and dv of one visible pair. `bd` is the padded head dim; `parts` is of a group's
/// query heads on the key's side (dkv_parts.h).
double time_of_backward(
    const Problem& problem, const TileRow& row, int bd, const DsDivision& division, int64_t parts);

}  // namespace orchard
