// Plans remembered by problem: a training run asks for the same few thousands of times.
#pragma once

#include <cstdint>
#include <memory>

#include "plan.h"

namespace orchard {

/// As plan_forward and plan_backward, which are pure functions: the second time from memory.
/// Thread-safe.
std::shared_ptr<const Plan> cached_plan_forward(const Problem& problem, const Layout& out);
std::shared_ptr<const Plan> cached_plan_backward(
    const Problem& problem, const Layout& out, const Layout& dout);

/// Plans that were computed, not remembered, in this process.
int64_t plans_computed();

/// Plans held now: at most 256.
int64_t plans_remembered();

}  // namespace orchard
