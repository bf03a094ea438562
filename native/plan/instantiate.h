// A kernel's name and the one line of Metal that makes its variant.
#pragma once

#include "tiles.h"

namespace orchard {

/// What Variant (shaders/loader.h) says, VEC and DROPOUT: a name each, with '!' before what is off.
std::vector<const char*> switches(const Problem& problem, bool chunks);

/// `length`: of the queries, or keys, that the threadgroups of a head share.
KernelPlan make_kernel(const Problem& problem, const std::string& family, const TileChoice& tile,
    const std::vector<const char*>& flags, int64_t heads, int64_t length);

}  // namespace orchard
