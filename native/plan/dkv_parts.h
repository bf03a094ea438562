// Whether the key's side of a backward divides the query heads of a group between threadgroups
// (shaders/dkv_parts.h): where too few threadgroups would leave the GPU idle, or where dS of a
// whole group does not fit.
#pragma once

#include "dscore_scratch.h"

namespace orchard {

/// As few equal parts of a group of `heads` query heads as give a launch, which has so many
/// `threadgroups` undivided, enough of them to fill the GPU; never more than `most`, or than there
/// are heads.
int64_t dkv_parts(int64_t heads, int64_t threadgroups, int64_t gpu_cores, int64_t most);

/// The kernels count elements of the parts' sums in int32.
constexpr int64_t kMostPartElements = int64_t{1} << 28;

/// What the sums of parts may take of Problem::scratch_bytes, in floats.
int64_t most_part_elements(const Problem& problem);

/// Floats of the sums of one part of one group.
int64_t sums_of_part(const Problem& problem);

/// How groups are divided, and what the sums of the parts take.
struct GroupDivision {
  int64_t parts;     // of a group; 1: undivided
  int64_t at_once;   // of them; the others take turns
  int64_t elements;  // of the float buffer for their sums; 0: none
};

/// The division for launches of `ds`, with a buffer that an eighth of Problem::scratch_bytes holds,
/// and that it holds beside dS. A part whose heads take turns has its sums in any case.
GroupDivision divide_groups(const Problem& problem, const DsDivision& ds, int keys_of_group);

}  // namespace orchard
