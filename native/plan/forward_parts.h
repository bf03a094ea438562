// Into how many parts a forward divides the keys.
#pragma once

#include "problem.h"

namespace orchard {

/// Threadgroups that a core works on side by side, so that one computes while others wait.
constexpr int64_t kHeldByCore = 4;

/// Floats that each part leaves: O, an origin and a sum of every row.
int64_t part_elements(const Problem& problem);

/// Threadgroups that share the keys of a block of queries: 1 where there are enough of them to fill
/// the GPU. `rows` are the queries of a threadgroup.
int64_t forward_parts(const Problem& problem, int64_t rows);

}  // namespace orchard
