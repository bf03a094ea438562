// Why Metal cannot run a call.
#pragma once

#include "problem.h"

namespace orchard {

/// Writes refusal, detail and advice of the first reason that holds; leaves the plan if none does.
void refuse(const Problem& problem, Plan& plan);

}  // namespace orchard
